"""The terms of the loss: by hand, against each other on packed rows, and where their gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from tests.train.small import packed, small_model
from torch.nn import functional

from pelagos.train.data import IGNORE
from pelagos.train.objective import (
    LossWeights,
    indexer_divergence,
    losses,
    next_of,
    sequence_balance,
    token_loss,
    update_balance_bias,
)

WEIGHTS = LossWeights()


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_token_loss_ignores_and_averages():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    targets = torch.tensor([3, IGNORE, 0, 10, IGNORE])
    chances = (hidden @ head.T).log_softmax(-1)
    expected = -(chances[0, 3] + chances[2, 0] + chances[3, 10]) / 3
    torch.testing.assert_close(token_loss(hidden, head, targets), expected)
    assert token_loss(hidden, head, torch.full((5,), IGNORE)) == 0


def test_balance_is_one_when_uniform_and_grows_with_skew():
    scores = torch.ones(2, 8, 4)
    turns = torch.stack((torch.arange(8) % 4, (torch.arange(8) + 1) % 4), -1).expand(2, -1, -1)
    assert sequence_balance(scores, turns)[0].item() == pytest.approx(1.0)
    skewed = scores.clone()
    skewed[..., 0] = 3.0
    same = torch.tensor([0, 1]).expand(2, 8, -1)
    # shares (3, 1, 1, 1) / 6, counts (2, 2, 0, 0) of a mean of 1
    assert sequence_balance(skewed, same)[0].item() == pytest.approx(2 * 3 / 6 + 2 * 1 / 6)
    assert sequence_balance(skewed, turns)[0].item() == pytest.approx(1.0)


def test_padding_counts_neither_in_balance_nor_in_load():
    generator = torch.Generator().manual_seed(0)
    scores, chosen = torch.rand(2, 8, 4, generator=generator), torch.randint(4, (2, 8, 2), generator=generator)
    real = torch.arange(8).expand(2, -1) < 5
    for with_padding, without in zip(
        sequence_balance(scores, chosen, real), sequence_balance(scores[:, :5], chosen[:, :5]), strict=True
    ):
        torch.testing.assert_close(with_padding, without)


def test_divergence_is_zero_when_equal_and_by_hand_otherwise():
    weights = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(1, 3, 5, dtype=torch.bool)
    visible[:, 0] = False  # a query that sees nothing
    visible[:, 1, 3:] = False
    weights = weights * visible.unsqueeze(2)
    target = weights.sum(2)
    same = target.clamp_min(1e-30).log() + 3.0  # a shift leaves the softmax alone
    assert indexer_divergence(same, weights, visible).item() == pytest.approx(0, abs=1e-6)
    share = target[:, 2] / target[:, 2].sum(-1, keepdim=True)
    three = target[:, 1, :3] / target[:, 1, :3].sum(-1, keepdim=True)
    flat = (share * (share * 5).log()).sum(-1) + (three * (three * 3).log()).sum(-1)
    expected = flat.sum() / 4  # two sequences of two seeing queries
    torch.testing.assert_close(indexer_divergence(torch.zeros(2, 3, 5), weights, visible), expected)
    assert indexer_divergence(torch.zeros(2, 3, 5), weights, torch.zeros(1, 3, 5, dtype=torch.bool)) == 0


@pytest.mark.parametrize("dense", [True, False])
def test_only_the_indexer_learns_from_its_divergence(dense):
    model = small_model()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = []
    for weight in (1.0, 0.0):
        terms = losses(model, *packed([[128]], 128), LossWeights(mtp=0.0, balance=0.0, indexer=weight), dense=dense)
        gradients.append(torch.autograd.grad(terms.total, parameters, allow_unused=True))
        assert terms.indexer > 0
    for name, with_it, without in zip(names, *gradients, strict=True):
        if ".indexer." in name:
            assert without is None or not without.any(), name
            assert with_it is not None, name
            assert with_it.any(), name
        elif with_it is not None and without is not None:
            assert torch.equal(with_it, without), name
        else:
            assert with_it is None or not with_it.any(), name
            assert without is None or not without.any(), name


def test_mtp_targets_by_hand():
    ids = torch.tensor([[10, 11, 12, 20, 21, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    targets = torch.tensor([[11, 12, 13, IGNORE, 22, IGNORE, IGNORE]])
    next_ids, after = next_of(ids, targets, segments)
    # Inside a sample: the next token, and the target that the next position has. At its end: no loss.
    assert next_ids.tolist()[0][:2] == [11, 12]
    assert next_ids[0, 3] == 21
    assert after.tolist() == [[12, 13, IGNORE, 22, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("dense", [True, False])
def test_a_packed_row_is_its_samples(model, dense):
    with torch.no_grad():
        together = packed([[128, 256]], 384)
        row = losses(model, *together, WEIGHTS, dense=dense)
        parts = []
        for column in (slice(0, 128), slice(128, 384)):
            parts.append(losses(model, *(t[:, column] for t in together), WEIGHTS, dense=dense))
    for term, counts in (("next_token", (128, 256)), ("mtp", (127, 255)), ("indexer", (125, 253))):
        expected = sum(getattr(p, term) * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(getattr(row, term), expected, rtol=2e-6, atol=0, msg=term)
    assert torch.equal(row.load, parts[0].load + parts[1].load)


def test_padding_and_neighbours_change_nothing(model):
    ids, positions, segments, targets = packed([[100, 60]], 384)
    with torch.no_grad():
        row = losses(model, ids, positions, segments, targets, WEIGHTS, dense=True)
        alone = [
            losses(model, ids[:, a:b], positions[:, a:b], segments[:, a:b], targets[:, a:b], WEIGHTS, dense=True)
            for a, b in ((0, 100), (128, 188))
        ]
    expected = (alone[0].next_token * 100 + alone[1].next_token * 60) / 160
    torch.testing.assert_close(row.next_token, expected, rtol=2e-6, atol=0)


def test_packed_logits_are_the_servers(model):
    """The same function trains and serves: a row of two samples against two plain forwards."""
    ids, positions, segments, targets = packed([[128, 96]], 256)
    with torch.no_grad():
        row = losses(model, ids, positions, segments, targets, WEIGHTS, dense=False)
        nats = [
            functional.cross_entropy(model(ids[:, c])[0], targets[0, c], reduction="sum")
            for c in (slice(0, 128), slice(128, 224))
        ]
    assert row.next_token.item() == pytest.approx(sum(nats).item() / 224, rel=2e-6)


def test_total_is_the_weighted_sum(model):
    weights = LossWeights(mtp=0.5, balance=0.25, indexer=2.0)
    with torch.no_grad():
        terms = losses(model, *packed([[128]], 128), weights, dense=True)
    parts = terms.next_token + 0.5 * terms.mtp + 0.25 * terms.balance + 2.0 * terms.indexer
    torch.testing.assert_close(terms.total, parts)
    assert terms.next_token.item() == pytest.approx(math.log(128), rel=0.1)
    assert terms.load.shape == (4, 8)
    assert terms.load.sum(-1).tolist() == [256] * 4


def test_bias_moves_towards_the_idle_experts():
    model = small_model()
    load = torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5]] * 4)
    update_balance_bias(model, load, 0.001)
    assert model.layers[0].ffn.gate.bias is None  # routed by table
    for block in (*model.layers[1:], *model.mtp):
        torch.testing.assert_close(block.ffn.gate.bias, 0.001 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0]))


def test_bias_levels_the_load():
    """Rule and router together: the busiest expert's share falls, here from 1.33 to 1.1 of the mean or less."""
    model = small_model()
    batch = packed([[128], [128]], 128)
    peaks = []
    with torch.no_grad():
        for _ in range(32):
            load = losses(model, *batch, WEIGHTS, dense=True).load
            peaks.append((load.max(-1).values / load.float().mean(-1))[1:].mean().item())
            update_balance_bias(model, load, 0.005)  # larger steps overshoot: with 0.02 it stays at 1.09
    assert peaks[-1] < 0.8 * peaks[0]
    assert peaks[-1] - 1 < 0.25 * (peaks[0] - 1)
