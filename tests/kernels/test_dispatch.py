"""What fronts of kernels refuse and where they send an operand."""

from __future__ import annotations

import pytest
import torch

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.ref import query as query_ref


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 4), r"x is \(2, 4\) of torch.float32, expected contiguous torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3).half(), r"x is \(2, 3\) of torch.float16, expected contiguous torch.float32 \(2, 3\)"),
        (torch.zeros(3, 2).T, "expected contiguous"),
    ],
)
def test_a_contract_says_what_is_wrong(tensor, message):
    with pytest.raises(ConfigError, match=f"op: {message}" if message[0] == "x" else message):
        contract("op", {"none": (None, (9,)), "y": (torch.zeros(1), (1,)), "x": (tensor, (2, 3), torch.float32)})


def test_a_contract_lets_pass_what_holds():
    contract("op", {"none": (None, (9,), torch.int8), "any": (torch.zeros(2).int(), (2,)), "x": (torch.ones(1), (1,))})


def test_the_device_chooses(monkeypatch):
    assert select("query", torch.zeros(1)) is query_ref
    with pytest.raises(ModuleNotFoundError, match=r"kernels\.ref\.nothing"):
        select("nothing", torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ModuleNotFoundError, match=r"kernels\.triton\.nothing|triton"):
        select("nothing", torch.zeros(1))
