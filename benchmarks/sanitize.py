"""NVIDIA's compute-sanitizer over the device tests of every kernel, three shapes each.

python -m benchmarks.sanitize [--tool memcheck] [--cases 3] [--jobs 6] [--only router,site] [--json FILE]

A kernel's tests run as they are, in a process of their own, without the allocator's cache, so that a byte beyond a
tensor is a byte beyond an allocation. Needs a CUDA device, compute-sanitizer on the path, and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pelagos.evals.engine_bench import stamp

TESTS = Path(__file__).resolve().parents[1] / "tests" / "kernels"
LIMIT_S = 300  # a kernel's


def main() -> int:
    """Run the tool over all kernels' tests; the exit code says whether each was clean."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--cases", type=int, default=3, help="shapes a kernel")
    parser.add_argument("--jobs", type=int, default=6, help="kernels at a time")
    parser.add_argument("--only", help="comma-separated kernels (default: all that have device tests)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    tests = collected()
    wanted = args.only.split(",") if args.only else sorted(tests)
    if unknown := [name for name in wanted if name not in tests]:
        parser.error(f"no device tests of {', '.join(unknown)}; there are those of {', '.join(sorted(tests))}")
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda name: checked(args.tool, name, spread(tests[name], args.cases)), wanted))
    clean = all(row["clean"] for row in rows)
    result = stamp("python -m benchmarks.sanitize " + " ".join(sys.argv[1:])) | {
        "bench": "sanitize", "tool": args.tool, "kernels": rows, "clean": clean,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not clean)


def collected() -> dict[str, list[str]]:
    """The ids of device tests by kernel, in the order of the file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", TESTS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    tests: dict[str, list[str]] = {}
    for line in found.stdout.splitlines():
        if match := re.match(r"(.*/)?test_(\w+)\.py::", line):
            tests.setdefault(match[2], []).append(line)
    if not tests:
        raise SystemExit(f"no device tests found: {found.stdout[-500:]}{found.stderr[-500:]}")
    return tests


def spread(cases: list[str], count: int) -> list[str]:
    """So many cases of the first two thirds, which are the smaller ones."""
    return cases[:: max(1, 2 * len(cases) // (3 * count))][:count]


def checked(tool: str, name: str, cases: list[str]) -> dict[str, Any]:
    """Run a kernel's cases under the tool and print how it went."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "120"]
    command += [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *cases]
    begun, environment = time.perf_counter(), os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = str(error), -1
    summary = re.findall(r"(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", said)
    passed = re.findall(r"(\d+) passed", said)
    row: dict[str, Any] = {
        "kernel": name, "cases": cases, "clean": code == 0 and passed == [str(len(cases))],
        "summary": summary[-1] if summary else said[-300:], "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
