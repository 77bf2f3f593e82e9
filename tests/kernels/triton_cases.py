"""What the tests of the Triton kernels share: running a script with the interpreter, errors of results, compiling."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SRC = Path(__file__).resolve().parents[2] / "src"


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of `want`."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


# Imports once what all scripts need and forks for each: a line of JSON in, a line of JSON out.
NURSERY = """
import json, os, signal, sys, tempfile, traceback
import numpy, torch, triton, triton.language
import pelagos.config, triton_cases
for line in sys.stdin:
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        status = 0
        try:
            exec(compile(json.loads(line), "script", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status, said = os.waitpid(child, 0)[1], []
    for file in files:
        file.seek(0)
        said.append(file.read().decode())
        file.close()
    print(json.dumps([os.waitstatus_to_exitcode(status), *said]), flush=True)
"""


@functools.cache
def nursery(interpret: bool) -> subprocess.Popen[str]:
    """A process that runs scripts; it ends with this one."""
    environment = {**os.environ, "PYTHONPATH": f"{SRC}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    made = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=environment)  # fmt: skip
    atexit.register(made.communicate)
    return made


def run(script: str, *, interpret: bool) -> str:
    """Run a script in a process of its own, the interpreter having to be chosen before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    made = nursery(interpret)
    assert made.stdin is not None
    assert made.stdout is not None
    print(json.dumps(script), file=made.stdin, flush=True)
    status, out, err = json.loads(made.stdout.readline())
    assert status == 0, err[-3000:]
    return out


def hazards(ptx: str) -> list[str]:
    """What loops of a kernel for sm_90 leave to chance.

    Products whose operand A is in registers that are in flight at the loop's end, where the next round overwrites them,
    and no fence between copies (in the loop, or of other warps that arrive where it waits) and what the matrix unit
    reads.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith("$L")}
    found = []
    for at, line in enumerate(lines):
        back = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if back is None or labels.get(back[1], at) >= at:
            continue
        body, flying = lines[labels[back[1]] : at], 0
        for own in body:
            if own.startswith("wgmma.mma_async"):
                groups = re.findall(r"\{[^}]*\}", own)
                flying += len(groups) > 1 and groups[1].count(",") == 3
            elif own.startswith("wgmma.wait_group") and own.endswith(" 0;"):
                flying = 0
        if flying:
            found.append(f"{flying} products in flight")
        text = "\n".join(body)
        copied = re.search(r"cp\.async\.c[ag]", text) is not None and "mbarrier" not in text
        if "wgmma.mma_async" in text and copied and "fence.proxy.async" not in text:
            found.append("no fence after copies")
        events = re.findall(r"mbarrier\.try_wait|wgmma\.mma_async|fence\.proxy\.async", text)
        if "cp.async.mbarrier.arrive" in ptx and "wgmma.mma_async" in events:
            around = [*zip(events, [*events[1:], events[0]], strict=True)]
            waits = [then for event, then in around if event == "mbarrier.try_wait"]
            if "wgmma.mma_async" in waits:
                found.append("no fence after a wait for copies")
    return found


def compile_all(target: tuple, kernels: list, types: dict[str, str], unaligned: tuple[str, ...] = ()) -> None:
    """Compile each (kernel, constants, types and options of its own) for a target and print how many there were.

    Pointers count as aligned to 16 bytes but those named; to be called where triton may be imported.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    for kernel, constants, own in kernels:
        options = {name: own[name] for name in ("num_warps", "num_stages") if name in own}
        known = {**types, **own}
        signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        pointers = [i for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*" and n not in unaligned]
        attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        made = triton.compile(source(kernel, signature, places, attributes), target=GPUTarget(*target), options=options)
        if target[:2] == ("cuda", 90):
            assert not (found := hazards(made.asm["ptx"])), f"{kernel.__module__}.{kernel.__name__}: {found}"
    print("compiled", len(kernels))
