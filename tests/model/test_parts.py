"""Parts of the model against what the report says of them, on hand-made inputs."""

import pytest
import torch
from drawn import TINY, drawn, ids_of

from pelagos.config import preset
from pelagos.model import FullSequence, Transformer
from pelagos.model.experts import Router
from pelagos.model.layers import Linear, quantize_activations

PUBLISHED = {"flash": 284_332_240_471, "pro": 1_572_997_201_763}  # parameters without MTP block and hash tables


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    model = Transformer(preset(name), device="meta")
    counted = sum(
        tensor.numel()
        for name, tensor, kind in model.released_tensors()
        if kind != "i64" and not name.startswith("mtp.")
    )
    assert counted == PUBLISHED[name]
    assert all(parameter.is_meta for parameter in model.parameters())  # sized, not allocated


def test_released_names_and_kinds() -> None:
    model = Transformer(TINY, device="meta")
    kinds = {name: kind for name, _, kind in model.released_tensors()}
    wanted = {
        "embed.weight": "bf16",
        "head.weight": "bf16",
        "norm.weight": "bf16",
        "hc_head_fn": "f32",
        "layers.0.attn.wq_a.weight": "fp8",
        "layers.0.attn.attn_sink": "f32",
        "layers.0.attn_norm.weight": "bf16",
        "layers.0.hc_attn_fn": "f32",
        "layers.0.ffn.gate.tid2eid": "i64",
        "layers.0.ffn.gate.weight": "bf16",
        "layers.1.attn.compressor.ape": "f32",
        "layers.1.attn.compressor.wkv.weight": "bf16",
        "layers.1.attn.indexer.wq_b.weight": "fp8",
        "layers.1.attn.indexer.weights_proj.weight": "bf16",
        "layers.2.ffn.gate.bias": "f32",
        "layers.3.ffn.experts.7.w2.weight": "fp4",
        "layers.3.ffn.shared_experts.w3.weight": "fp8",
        "mtp.0.e_proj.weight": "fp8",
        "mtp.0.hc_head_base": "f32",
    }
    assert {name: kinds.get(name) for name in wanted} == wanted
    assert len(kinds) == sum(1 for _ in model.released_tensors())  # no name twice
    assert "layers.2.ffn.gate.tid2eid" not in kinds
    assert "layers.0.ffn.gate.bias" not in kinds
    assert "layers.0.attn.compressor.ape" not in kinds
    assert "layers.2.attn.indexer.wq_b.weight" not in kinds


def test_expert_views_are_live() -> None:
    model = drawn(TINY, 1)
    views = {name: tensor for name, tensor, _ in model.released_tensors()}
    with torch.no_grad():
        views["layers.2.ffn.experts.3.w3.weight"].fill_(7.0)
    experts = model.get_submodule("layers.2.ffn.experts")
    width = TINY.moe_intermediate_size
    assert bool((experts.get_parameter("w13")[3, width:] == 7).all())
    assert not bool((experts.get_parameter("w13")[3, :width] == 7).any())


def test_hash_routing_reads_the_table() -> None:
    """The first layers choose by token id alone; the weights still are the scores."""
    model, ids = drawn(TINY, 2), ids_of(TINY, 1, 40)
    aux: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        model.run(model.step(ids), FullSequence(TINY.sliding_window), aux)
    for index, notes in enumerate(aux):
        gate = model.get_submodule(f"layers.{index}.ffn.gate")
        assert isinstance(gate, Router)
        if index < TINY.num_hash_layers:
            assert gate.tid2eid is not None
            assert torch.equal(notes["chosen"], gate.tid2eid[ids.flatten()])
        else:
            assert gate.bias is not None
            best = (notes["router_scores"] + gate.bias).topk(TINY.num_experts_per_tok).indices
            assert torch.equal(notes["chosen"].sort().values, best.sort().values)
        picked = notes["router_scores"].gather(1, notes["chosen"])
        share = picked / picked.sum(1, keepdim=True) * TINY.routed_scaling_factor
        torch.testing.assert_close(notes["chosen_weights"], share)


def test_bias_chooses_but_does_not_weigh() -> None:
    router = Router(TINY, hashed=False)
    assert router.bias is not None
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(3))
    x, ids = torch.randn(9, TINY.hidden_size, generator=torch.Generator().manual_seed(4)), torch.zeros(9).long()
    _, _, scores = router(x, ids)
    router.bias[5] = 100.0
    chosen, weights, same = router(x, ids)
    assert bool((chosen == 5).any(1).all())
    assert torch.equal(scores, same)
    assert float(weights.detach().max()) < TINY.routed_scaling_factor
    assert not router.bias.requires_grad


def test_scores_are_the_root_of_softplus() -> None:
    router = Router(TINY, hashed=False)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2, 0] = 3.0
    _, _, scores = router(torch.ones(1, TINY.hidden_size), torch.zeros(1).long())
    assert scores[0, 0].item() == pytest.approx(0.6931472**0.5)
    assert scores[0, 2].item() == pytest.approx(3.0485873**0.5)


@pytest.mark.parametrize(
    ("stored", "simulate_input", "quantizes"),
    [("fp8", True, True), ("fp4", True, True), ("f32", True, False), ("bf16", True, False), ("fp8", False, False)],
)
def test_only_products_with_quantised_weights_quantise_activations(
    stored: str, simulate_input: bool, quantizes: bool
) -> None:
    layer = Linear(128, 16, "fp8", simulate_input=simulate_input).requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    layer.weight.normal_(generator=generator)
    x = torch.randn(3, 128, generator=generator)
    plain, seen = x @ layer.weight.T, quantize_activations(x) @ layer.weight.T
    assert float((plain - seen).abs().max()) > 0.05
    torch.testing.assert_close(layer(x), plain)
    layer.simulate, layer.stored = True, stored
    assert layer.quantizes_input == quantizes
    torch.testing.assert_close(layer(x), seen if quantizes else plain)


def test_set_format_reaches_one_layer() -> None:
    model = drawn(TINY, 1, "released")
    model.set_format("layers.1.attn.wq_a.weight", "f32")
    model.set_format("layers.1.ffn.experts.0.w1.weight", "bf16")
    model.set_format("hc_head_fn", "f32")
    model.set_format("layers.0.ffn.gate.tid2eid", "i64")
    formats = {name: getattr(module, "stored", None) for name, module in model.named_modules()}
    assert (formats["layers.1.attn.wq_a"], formats["layers.2.attn.wq_a"]) == ("f32", "fp8")
    assert (formats["layers.1.ffn.experts"], formats["layers.2.ffn.experts"]) == ("bf16", "fp4")


def test_wo_a_sees_plain_activations() -> None:
    model = drawn(TINY, 1, "released")
    quiet = {
        name for name, module in model.named_modules() if isinstance(module, Linear) and not module.quantizes_input
    }
    for index in range(TINY.num_hidden_layers):
        assert f"layers.{index}.attn.wo_a" in quiet
        assert f"layers.{index}.attn.wo_b" not in quiet
    assert "head" in quiet
    assert "layers.1.attn.compressor.wkv" in quiet


def test_indexer_learns_from_detached_inputs() -> None:
    """The indexer's loss must not move the backbone, and its keys come from its own compressor."""
    model, ids = drawn(TINY, 5), ids_of(TINY, 1, 32)
    aux: list[dict[str, torch.Tensor]] = []
    model.run(model.step(ids), FullSequence(TINY.sliding_window), aux)
    aux[1]["index_scores"].sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(name.startswith("layers.1.attn.indexer.") for name in moved)
