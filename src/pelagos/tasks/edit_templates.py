"""Templates of file edits: change what is asked and nothing else."""

# ruff: noqa: E501  scripts and texts that are one line stay one
import json
import random

from pelagos.tasks.draft import Draft, words


def rename_function(r: random.Random) -> Draft:
    """Rename a function where it is defined and called, and not where its name is part of another."""
    old, new, other, extra = words(r, 4)
    files = {
        "lib.py": f"def {old}(x):\n    return x * {r.randint(2, 9)}\n\n\ndef {old}_{extra}(x):\n    return {old}(x) + 1\n",
        f"{other}.py": f"from lib import {old}, {old}_{extra}\n\nprint({old}(2), {old}_{extra}(3))\n",
    }
    check = f"""
text = read('lib.py') + read('{other}.py')
names = __import__('re').findall(r'\\w+', text)
assert '{old}' not in names and names.count('{new}') == 4 and names.count('{old}_{extra}') == 3, names
assert run("import {other}").returncode == 0
"""
    solution = f"sed -i 's/\\b{old}\\b/{new}/g' lib.py {other}.py\n"
    ask = f"Rename the function `{old}` to `{new}` everywhere. `{old}_{extra}` keeps its name."
    return Draft(ask, files, solution, check)


def ini_setting(r: random.Random) -> Draft:
    """Change a key in one section of several that have it."""
    sections, key, value = words(r, 4), r.choice(("port", "limit", "retries")), r.randint(100, 999)
    target = r.choice(sections)
    old = {name: r.randint(1, 99) for name in sections}
    text = "".join(f"[{name}]\n# of {name}\n{key} = {old[name]}\nname = {name}\n\n" for name in sections)
    before = f"[{target}]\n# of {target}\n{key} = "
    want = text.replace(f"{before}{old[target]}", f"{before}{value}")
    solution = f"sed -i '/^\\[{target}\\]/,/^\\[/s/^{key} = .*/{key} = {value}/' settings.ini\n"
    ask = f"In `settings.ini`, set `{key}` of section `{target}` to {value}. Every other line stays as it is."
    return Draft(ask, {"settings.ini": text}, solution, f"assert read('settings.ini') == {want!r}\n")


def json_field(r: random.Random) -> Draft:
    """Set a nested field of a JSON file."""
    a, b, c, d = words(r, 4)
    data = {a: {b: {c: r.randint(1, 9), d: [1, 2]}, "keep": True}, "version": r.randint(1, 9)}
    value = r.randint(1000, 9999)
    want = json.loads(json.dumps(data))
    want[a][b][c] = value
    solution = f"""python3 - <<'END'
import json
data = json.load(open('config.json'))
data['{a}']['{b}']['{c}'] = {value}
json.dump(data, open('config.json', 'w'), indent=2)
END
"""
    ask = f"Set `{a}.{b}.{c}` in `config.json` to the number {value} and leave the rest of the data as it is."
    return Draft(ask, {"config.json": json.dumps(data, indent=2)}, solution,
                 f"assert json.loads(read('config.json')) == json.loads({json.dumps(want)!r})\n")  # fmt: skip


def csv_column(r: random.Random) -> Draft:
    """Drop a column by name."""
    columns = words(r, 5)
    rows = [[str(r.randint(0, 999)) for _ in columns] for _ in range(r.randint(8, 20))]
    drop = r.randrange(len(columns))
    text = "".join(",".join(row) + "\n" for row in [columns, *rows])
    want = "".join(",".join(row[:drop] + row[drop + 1 :]) + "\n" for row in [columns, *rows])
    keep = ",".join(str(n + 1) for n in range(len(columns)) if n != drop)
    return Draft(f"Remove the column `{columns[drop]}` from `{columns[0]}.csv`; rows and other columns keep their order.",
                 {f"{columns[0]}.csv": text}, f"cut -d, -f{keep} {columns[0]}.csv > t && mv t {columns[0]}.csv\n",
                 f"assert read('{columns[0]}.csv') == {want!r}\nassert os.listdir('.') == ['{columns[0]}.csv']\n")  # fmt: skip


def license_header(r: random.Random) -> Draft:
    """Put a line on top of the files that lack it."""
    names, owner = words(r, 6), r.choice(("Example Works", "Sample House", "Test Yard")) + f" {r.randint(2, 99)}"
    line = f"# Copyright {owner}"
    files = {f"src/{n}.py": (line + "\n" if i % 3 == 0 else "") + f"{n} = {i}\n" for i, n in enumerate(names)}
    files["src/notes.txt"] = "not code\n"
    solution = f"for f in src/*.py; do grep -qx '{line}' $f || sed -i '1i {line}' $f; done\n"
    want = {name: (line + "\n" + text.removeprefix(line + "\n") if name.endswith(".py") else text)
            for name, text in files.items()}  # fmt: skip
    return Draft(f"Every `.py` file under `src/` must start with the line `{line}`. Add it where it is missing, once.",
                 files, solution, f"for name, text in {want!r}.items():\n    assert read(name) == text, name\n")  # fmt: skip


def sort_numbers(r: random.Random) -> Draft:
    """Sort lines as numbers and drop what is double."""
    name = words(r, 1)[0]
    numbers = [r.randint(-500, 5000) for _ in range(r.randint(30, 60))]
    numbers += numbers[:7]
    want = "".join(f"{n}\n" for n in sorted(set(numbers)))
    return Draft(f"Sort the lines of `{name}.txt` as numbers, smallest first, each value once.",
                 {f"{name}.txt": "".join(f"{n}\n" for n in numbers)}, f"sort -nu {name}.txt -o {name}.txt\n",
                 f"assert read('{name}.txt') == {want!r}\n")  # fmt: skip


def date_format(r: random.Random) -> Draft:
    """Write dates another way, and only dates."""
    name, *rest = words(r, 9)
    lines = [
        f"{w}: {r.randint(1990, 2030)}/{r.randint(1, 12):02d}/{r.randint(1, 28):02d} path/{w}/{r.randint(10, 99)}"
        for w in rest
    ]
    text = "".join(line + "\n" for line in lines)
    want = "".join(
        f"{line[: line.index(':')]}: {line.split()[1].replace('/', '-')} {line.split()[2]}\n" for line in lines
    )
    solution = f"sed -i -E 's#\\b([0-9]{{4}})/([0-9]{{2}})/([0-9]{{2}})\\b#\\1-\\2-\\3#g' {name}.log\n"
    return Draft(f"Dates in `{name}.log` are written 2001/02/03. Make them 2001-02-03; leave the paths alone.",
                 {f"{name}.log": text}, solution, f"assert read('{name}.log') == {want!r}\n")  # fmt: skip


def env_merge(r: random.Random) -> Draft:
    """Merge two files of settings, the second wins."""
    names = [w.upper() for w in words(r, 9)]
    base = {n: r.randint(1, 99) for n in names[:6]}
    over = {n: r.randint(100, 999) for n in names[4:]}
    out = names[0].lower()
    want = "".join(f"{k}={v}\n" for k, v in sorted((base | over).items()))
    solution = f"cat over.env base.env | sort -t= -k1,1 -s | awk -F= '!seen[$1]++' > {out}.env\n"
    return Draft(f"Merge `base.env` and `over.env` into `{out}.env`: lines KEY=value sorted by key; where both have a key, "
                 "`over.env` wins.", {"base.env": "".join(f"{k}={v}\n" for k, v in base.items()),
                                      "over.env": "".join(f"{k}={v}\n" for k, v in over.items())},
                 solution, f"assert read('{out}.env') == {want!r}\n")  # fmt: skip


def table_of_contents(r: random.Random) -> Draft:
    """List a document's headings at its top."""
    name, *heads = words(r, r.randint(5, 9))
    body = "".join(f"## {h.title()}\n\nText about {h}.\n\n" for h in heads)
    want = "# Guide\n\n" + "".join(f"- {h.title()}\n" for h in heads) + "\n" + body
    solution = f"""python3 - <<'END'
text = open('{name}.md').read()
heads = [line[3:] for line in text.splitlines() if line.startswith('## ')]
open('{name}.md', 'w').write(text.replace('# Guide\\n\\n', '# Guide\\n\\n' + ''.join('- ' + h + '\\n' for h in heads) + '\\n', 1))
END
"""
    return Draft(f"After the title of `{name}.md` put a list with the text of every `##` heading, one `- ` line each in "
                 "order, and an empty line after the list.", {f"{name}.md": "# Guide\n\n" + body}, solution,
                 f"assert read('{name}.md') == {want!r}\n")  # fmt: skip
