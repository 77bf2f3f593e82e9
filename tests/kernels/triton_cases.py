"""What the tests of the Triton kernels share: running a script with the interpreter, errors of results, compiling."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SRC = Path(__file__).resolve().parents[2] / "src"


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of `want`."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))


def run(script: str, *, interpret: bool) -> str:
    """Run a script in a process of its own, the interpreter having to be chosen before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = {**os.environ, "PYTHONPATH": f"{SRC}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
        triton.compile(source(kernel, signature, places, attributes), target=GPUTarget(*target), options=options)
    print("compiled", len(kernels))
