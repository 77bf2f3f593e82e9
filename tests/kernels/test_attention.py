"""Attention over window rows and entries with a sink, against one query at a time."""

import math

import pytest
import torch
from torch import Tensor

from pelagos.kernels.ref.attention import sparse_attention, window_mask

WINDOW, HEADS, WIDTH = 8, 2, 6
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 0.0, "atol": 1e-6}}


def naive(q: Tensor, keys: list[Tensor], sink: Tensor) -> Tensor:
    """One query (H, C) over its keys (C,): softmax over keys and one sink logit a head; the sink has no value."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(q.shape[0]):
        logits = [float(q[head].double() @ key.double()) / math.sqrt(q.shape[1]) for key in keys]
        total = math.exp(float(sink[head])) + sum(math.exp(each) for each in logits)
        for logit, key in zip(logits, keys, strict=True):
            out[head] += math.exp(logit) / total * key.double()
    return out


def drawn(length: int, batch: int = 2, entries: int = 0, picked: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length + entries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {"q": normal(batch, length, HEADS, WIDTH), "rows": normal(batch, WINDOW + length, WIDTH)}
    made["sink"] = normal(HEADS)
    if entries:
        made["entries"] = normal(batch, length, picked, WIDTH) if picked else normal(batch, entries, WIDTH)
        made["entry_mask"] = torch.rand(batch, length, picked or entries, generator=generator) < 0.6
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 3, 40])
@pytest.mark.parametrize(
    ("length", "entries", "picked"), [(1, 0, 0), (1, 5, 0), (5, 5, 0), (8, 5, 3), (21, 5, 0), (30, 9, 4)]
)
def test_equals_one_query_at_a_time(dtype: torch.dtype, start: int, length: int, entries: int, picked: int) -> None:
    made = drawn(length, entries=entries, picked=picked)
    made["rows"][:, : max(WINDOW - start, 0)] = 0  # before the sequence
    q, rows = made["q"].to(dtype), made["rows"].to(dtype)
    candidates, mask = made.get("entries"), made.get("entry_mask")
    shown = None if candidates is None else candidates.to(dtype)
    out, weights = sparse_attention(
        q, rows, window_mask(start, length, WINDOW, None, q.device), shown, mask, made["sink"], window=WINDOW
    )
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert (weights is None) == (candidates is None)
    for row in range(2):
        for t in range(length):
            first = max(WINDOW - start, t + 1)  # the last WINDOW rows, itself included, none before the sequence
            keys = list(made["rows"][row, first : t + WINDOW + 1])
            assert len(keys) == min(WINDOW, start + t + 1)
            if candidates is not None and mask is not None:
                own = candidates[row, t] if picked else candidates[row]
                keys += list(own[mask[row, t]])
            wanted = naive(made["q"][row, t], keys, made["sink"])
            torch.testing.assert_close(out[row, t].double(), wanted, **CLOSE[dtype])


def test_weights_are_the_entries_share() -> None:
    made = drawn(5, entries=7)
    mask = window_mask(20, 5, WINDOW, None, made["q"].device)
    out, weights = sparse_attention(
        made["q"], made["rows"], mask, made["entries"], made["entry_mask"], made["sink"], window=WINDOW
    )
    assert weights is not None
    assert weights.dtype == torch.float32
    assert weights.shape == (2, 5, HEADS, 7)
    assert bool((weights[~made["entry_mask"].unsqueeze(2).expand(weights.shape)] == 0).all())
    near, _ = sparse_attention(
        made["q"],
        made["rows"],
        mask,
        torch.zeros_like(made["entries"]),
        made["entry_mask"],
        made["sink"],
        window=WINDOW,
    )
    assert float((out - near).abs().max()) > 0.1
    assert bool((weights.sum(-1) < 1).all())


def test_sink_takes_share_without_value() -> None:
    """One visible key and a sink as strong: half of the key's value; without a sink all of it."""
    q = torch.zeros(1, 1, 2, WIDTH)
    rows = torch.zeros(1, WINDOW + 1, WIDTH)
    rows[0, -1] = 4.0
    mask = window_mask(0, 1, WINDOW, None, q.device)
    out, _ = sparse_attention(q, rows, mask, None, None, torch.tensor([0.0, -1e9]), window=WINDOW)
    assert out[0, 0, 0].tolist() == pytest.approx([2.0] * WIDTH)
    assert out[0, 0, 1].tolist() == pytest.approx([4.0] * WIDTH)


@pytest.mark.parametrize("length", [1, 100, 128, 129, 300])
@pytest.mark.parametrize("start", [0, 1, 127, 128, 500])
def test_window_is_128_keys_with_oneself(start: int, length: int) -> None:
    mask = window_mask(start, length, 128, None, torch.device("cpu"))
    seen = mask.sum(-1).flatten()[:length]
    assert seen.tolist() == [min(128, start + t + 1) for t in range(length)]


@pytest.mark.parametrize("length", [7, 8, 20])
def test_window_mask_with_segments(length: int) -> None:
    segments = torch.tensor([[(t // 5) for t in range(length)], [(t >= 2) for t in range(length)]]).int()
    mask = window_mask(0, length, WINDOW, segments, torch.device("cpu"))
    blocks = max(1, -(-length // WINDOW))
    tiled = mask.unsqueeze(1) if blocks == 1 else mask
    size = tiled.shape[2]
    for row in range(2):
        for t in range(length):
            tile, inside = divmod(t, size)
            got = {int(r) + tile * size - WINDOW for r in tiled[row, tile, inside].nonzero().flatten()}
            same = segments[row] == segments[row, t]
            assert got == {s for s in range(max(0, t - WINDOW + 1), t + 1) if same[s]}


def test_wide_queries_round_between_products() -> None:
    """Given float64, logits and weights are still float32 numbers, as the released products leave them."""
    made = drawn(4, batch=1)
    mask = window_mask(30, 4, WINDOW, None, made["q"].device)
    q, rows = made["q"].double(), made["rows"].double()
    out, _ = sparse_attention(q, rows, mask, None, None, made["sink"], window=WINDOW)
    logits = torch.einsum("bshd,brd->bshr", q, rows).float().double() * WIDTH**-0.5
    logits = logits.masked_fill(~mask.unsqueeze(2), -torch.inf)
    last = made["sink"].double()[:, None].expand(1, 4, HEADS, 1)
    weights = torch.cat((logits, last), -1).softmax(-1)[..., :-1].float().double()
    torch.testing.assert_close(out, torch.einsum("bshr,brd->bshd", weights, rows), rtol=0, atol=1e-14)
