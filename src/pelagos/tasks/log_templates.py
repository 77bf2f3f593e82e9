"""Templates of log mining: one answer that is in the log and in no single line of it."""

# ruff: noqa: E501  scripts and texts that are one line stay one
import itertools
import random
from collections import Counter

from pelagos.tasks.draft import Draft, moment, words

PATHS = ("/", "/cart", "/login", "/search", "/item", "/help")


def _answer(ask: str, files: dict[str, str], answer: object, solution: str, out: str) -> Draft:
    check = f"assert read({out!r}).strip() == {str(answer)!r}, read({out!r})\n"
    return Draft(f"{ask} Write only the answer into `{out}`.", files, solution, check)


def _access(r: random.Random, n: int) -> list[tuple[str, str, str, int, int, int]]:
    hosts = [f"10.{r.randint(0, 9)}.{r.randint(0, 9)}.{k}" for k in range(1, 9)]
    weights = [r.randint(1, 9) for _ in hosts]
    return [(moment(40 * k + r.randint(0, 30)), r.choices(hosts, weights)[0], r.choice(PATHS),
             r.choice((200, 200, 200, 301, 404, 500)), r.randint(100, 9000), r.randint(1, 900)) for k in range(n)]  # fmt: skip


def _text(rows: list[tuple[str, str, str, int, int, int]]) -> str:
    return "".join(f"{t} {host} GET {path} {code} {size}B {ms}ms\n" for t, host, path, code, size, ms in rows)


def top_host(r: random.Random) -> Draft:
    """The address with the most requests."""
    log, out = words(r, 2)
    while True:
        rows = _access(r, r.randint(150, 300))
        (first, most), (_, second) = Counter(row[1] for row in rows).most_common(2)
        if most > second:
            break
    return _answer(f"Which address has the most lines in `{log}.log`?", {f"{log}.log": _text(rows)}, first,
                   f"awk '{{print $2}}' {log}.log | sort | uniq -c | sort -rn | awk 'NR==1{{print $2}}' > {out}.txt\n",
                   f"{out}.txt")  # fmt: skip


def failed_requests(r: random.Random) -> Draft:
    """How often one path failed."""
    (log, out), path = words(r, 2), r.choice(PATHS[1:])
    rows = _access(r, r.randint(150, 300))
    count = sum(row[2] == path and row[3] >= 400 for row in rows)
    return _answer(f"How many requests for exactly `{path}` in `{log}.log` ended with a status of 400 or more?",
                   {f"{log}.log": _text(rows)}, count,
                   f"awk '$4==\"{path}\" && $5>=400' {log}.log | wc -l > {out}.txt\n", f"{out}.txt")  # fmt: skip


def slowest_path(r: random.Random) -> Draft:
    """The path with the greatest total time."""
    log, out = words(r, 2)
    rows = _access(r, r.randint(150, 300))
    total: Counter[str] = Counter()
    for row in rows:
        total[row[2]] += row[5]
    best = max(sorted(total), key=lambda p: total[p])
    return _answer(f"Add up the milliseconds of each path in `{log}.log`. Which path has the greatest sum?",
                   {f"{log}.log": _text(rows)}, best,
                   f"awk '{{t[$4]+=$7}} END {{for (p in t) print t[p], p}}' {log}.log | sort -rn | awk 'NR==1{{print $2}}' "
                   f"> {out}.txt\n", f"{out}.txt")  # fmt: skip


def bytes_of_host(r: random.Random) -> Draft:
    """The bytes one address got with status 200."""
    log, out = words(r, 2)
    rows = _access(r, r.randint(150, 300))
    host = rows[r.randrange(len(rows))][1]
    total = sum(row[4] for row in rows if row[1] == host and row[3] == 200)
    return _answer(f"How many bytes did {host} get in responses with status 200 in `{log}.log`?",
                   {f"{log}.log": _text(rows)}, total,
                   f"awk '$2==\"{host}\" && $5==200 {{s+=$6}} END {{print s+0}}' {log}.log > {out}.txt\n", f"{out}.txt")  # fmt: skip


def first_error_after_restart(r: random.Random) -> Draft:
    """The first error after the last restart."""
    log, out, part = words(r, 3)
    lines = [
        (moment(60 * k), r.choice(("INFO", "WARN", "ERROR")), r.choice((part, "core")))
        for k in range(r.randint(60, 120))
    ]
    for place in sorted(r.sample(range(5, len(lines) - 20), 3)):
        lines[place] = (lines[place][0], "INFO", "restart")
    lines[-3] = (lines[-3][0], "ERROR", part)
    last = max(k for k, line in enumerate(lines) if line[2] == "restart")
    answer = next(t for t, level, who in lines[last:] if level == "ERROR" and who == part)
    solution = (f"awk '$3==\"restart\"{{f=\"\"; next}} $2==\"ERROR\" && $3==\"{part}\" && f==\"\"{{f=$1}} END {{print f}}' {log}.log"
                f" > {out}.txt\n")  # fmt: skip
    return _answer(f"At what time is the first ERROR of `{part}` after the last restart in `{log}.log`?",
                   {f"{log}.log": "".join(f"{t} {level} {who}\n" for t, level, who in lines)}, answer, solution, f"{out}.txt")  # fmt: skip


def open_sessions(r: random.Random) -> Draft:
    """Who logged in and did not log out."""
    log, out, *users = words(r, 14)
    inside: set[str] = set()
    lines = []
    for k in range(r.randint(60, 100)):
        user = r.choice(users)
        act = "logout" if user in inside else "login"
        (inside.remove if user in inside else inside.add)(user)
        lines.append(f"{moment(100 * k)} {user} {act}\n")
    solution = f"awk '{{s[$2]=$3}} END {{for (u in s) if (s[u]==\"login\") n++; print n+0}}' {log}.log > {out}.txt\n"
    return _answer(f"How many users are still logged in at the end of `{log}.log`?", {f"{log}.log": "".join(lines)},
                   len(inside), solution, f"{out}.txt")  # fmt: skip


def longest_silence(r: random.Random) -> Draft:
    """The time of the line before the longest gap."""
    log, out = words(r, 2)
    seconds = sorted(r.sample(range(40000), r.randint(60, 120)))
    while len({b - a for a, b in itertools.pairwise(seconds)}) < 2:
        seconds = sorted(r.sample(range(40000), 80))
    gaps = [b - a for a, b in itertools.pairwise(seconds)]
    where = gaps.index(max(gaps))
    solution = f"""python3 - <<'END'
from datetime import datetime
times = [line.split()[0] for line in open('{log}.log')]
at = [datetime.fromisoformat(t.replace('Z', '+00:00')) for t in times]
gap, n = max((b - a, -k) for k, (a, b) in enumerate(zip(at, at[1:])))
open('{out}.txt', 'w').write(times[-n])
END
"""
    return _answer(f"Find the longest time between two neighbouring lines of `{log}.log` (the first such, if several). "
                   "Give the time of the line before it.",
                   {f"{log}.log": "".join(f"{moment(s)} tick {s % 7}\n" for s in seconds)}, moment(seconds[where]),
                   solution, f"{out}.txt")  # fmt: skip


def shared_requests(r: random.Random) -> Draft:
    """How many request ids are in both of two logs."""
    one, two, out = words(r, 3)
    ids = [f"{r.getrandbits(32):08x}" for _ in range(90)]
    a, b = r.sample(ids, 50), r.sample(ids, 50)
    solution = f"grep -o 'id=[0-9a-f]*' {one}.log | sort -u > a; grep -o 'id=[0-9a-f]*' {two}.log | sort -u > b; " \
               f"comm -12 a b | wc -l > {out}.txt; rm a b\n"  # fmt: skip
    files = {
        f"{name}.log": "".join(f"{moment(7 * k)} id={i} ok\n" for k, i in enumerate(got))
        for name, got in ((one, a), (two, b))
    }
    return _answer(f"How many different ids are in both `{one}.log` and `{two}.log`?", files, len(set(a) & set(b)), solution,
                   f"{out}.txt")  # fmt: skip
