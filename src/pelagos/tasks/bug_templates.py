"""Templates of small bugs: a module whose hidden tests fail, and the smallest change that mends it."""

# ruff: noqa: E501  scripts and texts that are one line stay one
import random

from pelagos.tasks.draft import Draft, words


def _bug(r: random.Random, says: str, wrong: str, right: str, body: str, tests: str) -> Draft:
    """A module with BUG where `wrong` stands; NAME is the function's made-up name."""
    name, module = words(r, 2)
    text = body.replace("BUG", wrong).replace("NAME", name)
    fixed = body.replace("BUG", right).replace("NAME", name)
    assert text.count(wrong) == 1, "the change must be one place"
    solution = f"""python3 - <<'END'
text = open('{module}.py').read()
open('{module}.py', 'w').write(text.replace({wrong.replace("NAME", name)!r}, {right.replace("NAME", name)!r}))
END
"""
    check = f"sys.path.insert(0, '.')\nfrom {module} import {name} as f\n{tests}"
    exec(compile(fixed, "fixed", "exec"), {})  # a template that does not even parse is our bug
    return Draft(f"`{name}` in `{module}.py` should {says}, but it does not always. Find the bug and fix it; hidden tests call the "
                 "function.", {f"{module}.py": text}, solution, check)  # fmt: skip


def off_by_one(r: random.Random) -> Draft:
    """A sum that forgets its end."""
    k = r.randint(2, 9)
    return _bug(r, f"return the sum of the multiples of {k} up to and including n", "range(0, n, ", "range(0, n + 1, ",
                f'def NAME(n):\n    """Sum of the multiples of {k} in 0..n."""\n    return sum(BUG{k}))\n',
                f"for n in range(60):\n    assert f(n) == sum(x for x in range(n + 1) if x % {k} == 0), n\n")  # fmt: skip


def mutable_default(r: random.Random) -> Draft:
    """A list shared by calls."""
    k = r.randint(2, 99)
    return _bug(r, f"append value + {k} to the given list, or to a new one, and return it", "found=[]):\n",
                "found=None):\n    found = [] if found is None else found\n",
                f'def NAME(value, BUG    found.append(value + {k})\n    return found\n',
                f"assert f(1) == [{k + 1}] and f(2) == [{k + 2}] and f(3, [0]) == [0, {k + 3}]\nx = []; assert f(1, x) is x\n")  # fmt: skip


def binary_search(r: random.Random) -> Draft:
    """A search that misses the last element."""
    miss = -r.randint(1, 9)
    return _bug(r, f"return the index of x in a sorted list, or {miss}", "while low < high:", "while low <= high:",
                f"""def NAME(items, x):
    low, high = 0, len(items) - 1
    BUG
        middle = (low + high) // 2
        if items[middle] == x:
            return middle
        if items[middle] < x:
            low = middle + 1
        else:
            high = middle - 1
    return {miss}
""", f"a = list(range(3, 90, 4))\nfor i, x in enumerate(a):\n    assert f(a, x) == i and f(a, x + 1) == {miss}\nassert f([], 1) == {miss}\n")  # fmt: skip


def precedence(r: random.Random) -> Draft:
    """An average without its parentheses."""
    w = r.randint(2, 9)
    return _bug(r, f"return the mean of a and b where b counts {w} times", f"a + b * {w} / {w + 1}", f"(a + b * {w}) / {w + 1}",
                'def NAME(a, b):\n    """Weighted mean."""\n    return BUG\n',
                f"for a in range(5):\n    for b in range(5):\n        assert abs(f(a, b) - (a + b * {w}) / {w + 1}) < 1e-9\n")  # fmt: skip


def leap_year(r: random.Random) -> Draft:
    """A century too many."""
    first = r.randint(1600, 1900)
    return _bug(r, f"count the leap years from {first} to the given year, both included", "y % 4 == 0", "y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)",
                f"def NAME(year):\n    return sum(1 for y in range({first}, year + 1) if BUG)\n",
                f"import calendar\nfor y in range({first}, 2450, 7):\n    assert f(y) == sum(map(calendar.isleap, range({first}, y + 1))), y\n")  # fmt: skip


def duration(r: random.Random) -> Draft:
    """A unit that is worth the wrong amount."""
    unit, seconds = r.choice((("m", 60), ("h", 3600), ("d", 86400), ("w", 604800)))
    wrong = r.choice([n for n in (6, 24, 100, 360, 8640, 6048) if n != seconds])
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    table = ", ".join("BUG" if u == unit else f'"{u}": {s}' for u, s in units.items())
    return _bug(r, 'turn a text like "1h30m" into seconds', f'"{unit}": {wrong}', f'"{unit}": {seconds}', f"""import re

UNITS = {{{table}}}


def NAME(text):
    return sum(int(n) * UNITS[u] for n, u in re.findall(r"(\\d+)([smhdw])", text))
""", f"for t, s in (('1s', 1), ('2m', 120), ('1h30m', 5400), ('3d', 259200), ('1w1s', 604801), ('7{unit}', {7 * seconds})):\n    assert f(t) == s, t\n")  # fmt: skip


def roman(r: random.Random) -> Draft:
    """A numeral that is never subtracted."""
    pairs = [(900, "CM"), (400, "CD"), (90, "XC"), (40, "XL"), (9, "IX"), (4, "IV")]
    value, letters = r.choice(pairs)
    single = [(1000, "M"), (500, "D"), (100, "C"), (50, "L"), (10, "X"), (5, "V"), (1, "I")]
    every = sorted([*pairs, *single], reverse=True)
    table = ", ".join("BUG" if v == value else f'({v}, "{s}")' for v, s in every)
    return _bug(r, "write a number from 1 to 3999 in Roman numerals", f'({value}, "{letters[::-1]}")', f'({value}, "{letters}")',
                f"PARTS = [{table}]\n\n\ndef NAME(n):\n    out = ''\n    for value, letters in PARTS:\n        while n >= value:\n            out += letters\n            n -= value\n    return out\n",
                "def back(s):\n    v = dict(I=1, V=5, X=10, L=50, C=100, D=500, M=1000)\n    n = [v[c] for c in s]\n    return sum(-a if a < b else a for a, b in zip(n, n[1:] + [0]))\n"
                "for n in range(1, 4000):\n    assert back(f(n)) == n and 'IIII' not in f(n) and 'XXXX' not in f(n), n\n")  # fmt: skip


def windows(r: random.Random) -> Draft:
    """Windows that stop one early."""
    k = r.randint(2, 6)
    return _bug(r, f"return every run of {k} neighbours of a list", f"len(items) - {k})", f"len(items) - {k} + 1)",
                f"def NAME(items):\n    return [items[i : i + {k}] for i in range(BUG]\n",
                f"for n in range(12):\n    a = list(range(n))\n    assert f(a) == [a[i:i + {k}] for i in range(max(0, n - {k} + 1))], n\n")  # fmt: skip


def clamp(r: random.Random) -> Draft:
    """Limits the wrong way round."""
    low, high = r.randint(-50, 0), r.randint(1, 50)
    return _bug(r, f"limit a number to {low}..{high}", f"min({low}, max({high}, x))", f"max({low}, min({high}, x))",
                "def NAME(x):\n    return BUG\n", f"for x in range(-100, 100):\n    assert f(x) == sorted(({low}, x, {high}))[1], x\n")  # fmt: skip
