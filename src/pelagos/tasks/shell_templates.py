"""Templates of shell work: finding, moving and counting files."""

# ruff: noqa: E501  scripts and texts that are one line stay one
import hashlib
import random

from pelagos.tasks.draft import Draft, words


def _tree(r: random.Random, n: int) -> dict[str, str]:
    names = words(r, n)
    return {
        f"data/{r.choice('abc')}/{name}.{r.choice(('txt', 'csv', 'md'))}": f"{name}\n" * r.randint(1, 40)
        for name in names
    }


def largest_file(r: random.Random) -> Draft:
    """Name the largest file of a tree."""
    (out,), files = words(r, 1), _tree(r, 14)
    best = r.choice(sorted(files))
    files[best] = "x" * r.randint(600, 900)
    return Draft(f"Write the path of the largest file under `data` (as `data/...`) into `{out}.txt`.", files,
                 f"find data -type f -printf '%s %p\\n' | sort -rn | awk 'NR==1{{print $2}}' > {out}.txt\n",
                 f"assert read('{out}.txt').strip() == '{best}'\n")  # fmt: skip


def by_extension(r: random.Random) -> Draft:
    """Move files into directories by their extension."""
    files, top = _tree(r, 12), words(r, 1)[0]
    want = {f"{top}/{name.rpartition('.')[2]}/{name.rpartition('/')[2]}": text for name, text in files.items()}
    return Draft(f"Move every file under `data` to `{top}/EXTENSION/NAME` (so `data/a/x.csv` becomes `{top}/csv/x.csv`) and "
                 "remove `data`.", files,
                 f"find data -type f | while read f; do e=${{f##*.}}; mkdir -p {top}/$e; mv $f {top}/$e/; done; rm -r data\n",
                 f"for name, text in {want!r}.items():\n    assert read(name) == text, name\nassert not os.path.exists('data')\n")  # fmt: skip


def by_checksum(r: random.Random) -> Draft:
    """Find the file with a SHA-256."""
    (out,), files = words(r, 1), _tree(r, 15)
    files = {name: text + f"{r.getrandbits(40):x}\n" for name, text in files.items()}
    best = r.choice(sorted(files))
    digest = hashlib.sha256(files[best].encode()).hexdigest()
    return Draft(f"One file under `data` has the SHA-256 `{digest}`. Copy it to `{out}.copy`.", files,
                 f"cp $(find data -type f -exec sha256sum {{}} + | awk '$1==\"{digest}\"{{print $2}}') {out}.copy\n",
                 f"assert hashlib.sha256(Path('{out}.copy').read_bytes()).hexdigest() == '{digest}'\n")  # fmt: skip


def permissions(r: random.Random) -> Draft:
    """Make scripts executable and nothing else."""
    names = words(r, 8)
    files = {f"bin/{name}{'.sh' if k % 2 else '.txt'}": "#!/bin/sh\n" for k, name in enumerate(names)}
    mode = r.choice((0o755, 0o750, 0o700, 0o711, 0o744))
    return Draft(f"Set the mode of every `.sh` file in `bin` to {mode:o} and of every other file there to 600.", files,
                 f"chmod 600 bin/*; chmod {mode:o} bin/*.sh; ls bin/{names[1]}.sh\n",
                 f"for p in Path('bin').iterdir():\n    assert p.stat().st_mode & 0o777 == ({mode} if p.suffix == '.sh' else 0o600), p\n"
                 f"assert len(list(Path('bin').iterdir())) == 8\n")  # fmt: skip


def broken_links(r: random.Random) -> Draft:
    """Point broken links at where their files went."""
    names, new = words(r, 6), r.choice(("store", "archive", "vault")) + str(r.randint(1, 99))
    files = {f"{new}/{n}.dat": f"{n}\n" for n in names[:4]} | {f"links/{n}": f"-> ../old/{n}.dat" for n in names[:4]}
    files |= {"kept/a.dat": "a\n", "links/fine": "-> ../kept/a.dat"}
    return Draft(f"The files of `old` were moved to `{new}`. Make the broken links in `links` point to them (relative links), "
                 "and leave the others as they are.", files,
                 f"cd links; for l in *; do [ -e $l ] || ln -sfn ../{new}/$(basename $(readlink $l)) $l; done\n",
                 f"for n in {names[:4]!r}:\n    assert os.readlink('links/' + n) == '../{new}/' + n + '.dat'\n"
                 "assert os.readlink('links/fine') == '../kept/a.dat'\n")  # fmt: skip


def makefile(r: random.Random) -> Draft:
    """Write a Makefile rule."""
    a, b, c, target = words(r, 4)
    files = {f"{n}.in": f"{n} {r.randint(1, 999)}\n" for n in (a, b, c)}
    want = "".join(files[f"{n}.in"] for n in (a, b, c))
    return Draft(f"Write a `Makefile` whose target `{target}.out` is made from `{a}.in`, `{b}.in` and `{c}.in` by putting them "
                 "after one another in this order, and is made again when one of them changed.", files,
                 f"printf '{target}.out: {a}.in {b}.in {c}.in\\n\\tcat $^ > $@\\n' > Makefile\n",
                 f"""
assert subprocess.run(['make', '{target}.out']).returncode == 0 and read('{target}.out') == {want!r}
Path('{b}.in').write_text('new\\n')
for name, when in {{'{a}.in': 1e9, '{c}.in': 1e9, '{target}.out': 1.1e9, '{b}.in': 1.2e9}}.items(): os.utime(name, (when, when))
assert subprocess.run(['make', '{target}.out']).returncode == 0 and 'new' in read('{target}.out')
""")  # fmt: skip


def word_count(r: random.Random) -> Draft:
    """The most frequent words of a tree."""
    out, *vocabulary = words(r, 12)
    counts = r.sample(range(3, 60), len(vocabulary))
    bag = [w for w, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
    r.shuffle(bag)
    files = {
        f"text/{k}.txt": "\n".join(" ".join(bag[i : i + 7]) for i in range(k, len(bag), 21)) + "\n" for k in (0, 7, 14)
    }
    best = [w for w, _ in sorted(zip(vocabulary, counts, strict=True), key=lambda p: -p[1])[:3]]
    return Draft(f"Write the three most frequent words of the files in `text` into `{out}.txt`, one a line, most frequent first.",
                 files, f"cat text/*.txt | tr ' ' '\\n' | grep . | sort | uniq -c | sort -rn | awk 'NR<=3{{print $2}}' > {out}.txt\n",
                 f"assert read('{out}.txt').split() == {best!r}\n")  # fmt: skip


def rename_series(r: random.Random) -> Draft:
    """Give numbered files a fixed width."""
    stem, new = words(r, 2)
    numbers = r.sample(range(1, 400), 12)
    files = {f"{stem}{n}.dat": f"{n}\n" for n in numbers}
    want = {f"{new}_{n:04d}.dat": f"{n}\n" for n in numbers}
    return Draft(f"Rename `{stem}N.dat` to `{new}_NNNN.dat`, the number with leading zeros to four digits, for every such file.", files,
                 f"for f in {stem}*.dat; do n=${{f#{stem}}}; mv $f $(printf '{new}_%04d.dat' ${{n%.dat}}); done\n",
                 f"assert {{p.name: p.read_text() for p in Path('.').iterdir()}} == {want!r}\n")  # fmt: skip
