"""What fronts of kernels have in common: operands are held against a contract, then the device chooses who computes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pelagos.errors import ConfigError


def contract(op: str, expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError unless each tensor, by name with its shape and perhaps its dtype, is so and contiguous.

    What is None is passed over.
    """
    for name, (tensor, shape, *kind) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.dtype not in (kind or (tensor.dtype,)):
            wanted = " ".join(map(str, ("contiguous", *kind, shape)))
            raise ConfigError(f"{op}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {wanted}")


def select(op: str, operand: Tensor) -> Any:
    """Return the module that computes `op` where an operand lies: Triton's on CUDA, elsewhere the reference.

    There is no falling back: without Triton a CUDA tensor raises ModuleNotFoundError.
    """
    return importlib.import_module(f"pelagos.kernels.{'triton' if operand.is_cuda else 'ref'}.{op}")
