"""A trace of the last token says what a whole forward computed there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pelagos.config import tiny
from pelagos.errors import RequestError
from pelagos.kernels.ref.compress import index_topk, visible_entries
from pelagos.model import FullSequence, Transformer
from pelagos.model import trace as tracing
from pelagos.model.trace import mixing, trace

CACHED = {"rtol": 1e-4, "atol": 1e-5}  # the cached token against the whole forward, float32


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(3)
    made = Transformer(tiny())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in made.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(made.config.vocab_size, made.config.n_routed_experts).argsort(1)[:, :2])
    return made.eval()


def ids_of(length: int) -> list[int]:
    return torch.randint(0, tiny().vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def whole_forward(model: Transformer, ids: list[int]) -> tuple[list[dict[str, Tensor]], Tensor]:
    aux: list[dict[str, Tensor]] = []
    step = model.step(torch.tensor([ids]))
    streams = model.run(step, FullSequence(model.config.sliding_window), aux)
    return aux, model.logits(model.collapse(streams, model.config))[0, -1]


@pytest.mark.parametrize("length", [1, 3, 4, 16, 37, 61])
@pytest.mark.parametrize("chunk", [8, 512])
def test_trace_is_the_forward(model: Transformer, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PREFILL_CHUNK", chunk)
    config, ids = model.config, ids_of(length)
    aux, logits = whole_forward(model, ids)
    found = trace(model, ids, following=3)
    assert found.ids == ids
    assert [token for token, _ in found.following] == logits.topk(3).indices.tolist()
    torch.testing.assert_close(
        torch.tensor([p for _, p in found.following]), logits.softmax(-1).topk(3).values, **CACHED
    )
    assert [each.layer for each in found.layers] == list(range(config.num_hidden_layers))
    assert [each.kind for each in found.layers] == ["window", "csa", "hca", "csa", "hca", "window"]
    assert [each.routing for each in found.layers] == ["hash"] * 2 + ["learned"] * 4
    for each, notes in zip(found.layers, aux, strict=True):
        assert each.ratio == config.layer_ratios[each.layer]
        assert each.window == (max(0, length - config.sliding_window), length - 1)
        assert each.visible == (length // each.ratio if each.ratio else 0)
        assert each.experts == notes["chosen"][-1].tolist()
        weights = torch.tensor(each.expert_weights)
        torch.testing.assert_close(weights, notes["chosen_weights"][-1], **CACHED)
        assert float(weights.sum()) == pytest.approx(config.routed_scaling_factor, rel=1e-5)
        for site in ("attn", "ffn"):
            seen = getattr(each, f"{site}_mixing")
            torch.testing.assert_close(torch.tensor(seen.matrix), notes[f"hc_{site}_comb"][0, -1], **CACHED)
        attended = list(range(each.visible)) if each.picks is None else each.picks
        assert (each.picks is None) == (each.kind != "csa")
        assert len(each.shares) == len(attended)
        if attended:
            by_entry = notes["entry_weights"][0, -1].mean(0)
            torch.testing.assert_close(torch.tensor(each.shares), by_entry[attended], **CACHED)
            assert sum(each.shares) == pytest.approx(float(by_entry.sum()), rel=1e-4)  # nothing else is attended
            assert 0 < sum(each.shares) < 1


def test_picks_are_the_best_scored_visible_entries(model: Transformer) -> None:
    ids = ids_of(61)
    aux, _ = whole_forward(model, ids)
    found = trace(model, ids)
    indexed = [each for each in found.layers if each.kind == "csa"]
    assert len(indexed) == 2
    for each in indexed:
        scores = aux[each.layer]["index_scores"][0, -1]
        best = sorted(range(len(scores)), key=lambda entry: -float(scores[entry]))[: model.config.index_topk]
        assert each.picks == sorted(best)
        assert len(best) < each.visible
        assert each.scores is not None
        torch.testing.assert_close(torch.tensor(each.scores), scores[each.picks], **CACHED)
        by_query = index_topk(aux[each.layer]["index_scores"], visible_entries(0, 61, 4, 15, scores.device)[None], 4)
        assert each.picks == by_query[0, -1].tolist()


def test_mixing_of_known_matrices() -> None:
    swap = mixing(torch.eye(4)[[1, 0, 3, 2]])
    assert (swap.row_sums, swap.column_sums, swap.spectral_norm) == ([1.0] * 4, [1.0] * 4, pytest.approx(1))
    skewed = mixing(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
    assert (skewed.row_sums, skewed.column_sums) == ([3.0, 9.0], [7.0, 5.0])
    assert skewed.spectral_norm == pytest.approx(45**0.5)  # singular values of this matrix: sqrt(45), sqrt(5)


def test_mixing_is_nearly_doubly_stochastic(model: Transformer) -> None:
    for each in trace(model, ids_of(20)).layers:
        for site in (each.attn_mixing, each.ffn_mixing):
            assert site.column_sums == pytest.approx([1.0] * 4, abs=1e-4)  # Sinkhorn ends with the columns
            assert site.row_sums == pytest.approx([1.0] * 4, abs=0.1)
            assert 0.99 < site.spectral_norm < 1.1


@pytest.mark.parametrize("ids", [[], [128], [-1], [3, 128, 4], [5, 6, 128]])
def test_ids_are_checked(model: Transformer, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="ids: expected"):
        trace(model, ids)
