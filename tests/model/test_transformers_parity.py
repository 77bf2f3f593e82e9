"""The reference mode against `transformers` in float32, over random configurations, weights and schedules.

Weights travel through checkpoints that we write and `transformers` loads, and the other way round. Randomisation
avoids what hides errors: zero sinks and biases, equal experts, too few index heads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pelagos.config import ModelConfig, RopeScaling, bundled_model_dir
from pelagos.load import load_model, save_model
from pelagos.model import ContiguousCache, Transformer

TOLERANCE = 1e-4  # largest difference of a logit
TIE_MARGIN = 1e-5  # below this the choice of an expert or entry is not defined by the mathematics
TIE_SHARE = 1e-3  # of all positions
CASES, MORE = 16, 240  # in every run, and with `-m slow`
NANO = bundled_model_dir("nano")


@functools.cache
def transformers() -> Any:
    """Imported where it is used: it takes seconds, of each process that shares the tests."""
    return pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """One thread for these small products, no progress bars or YaRN advice from the oracle; settings restored after."""
    level, threads = transformers().logging.get_verbosity(), torch.get_num_threads()
    torch.set_num_threads(1)
    transformers().logging.set_verbosity_error()
    transformers().logging.disable_progress_bar()
    yield
    transformers().logging.set_verbosity(level)
    transformers().logging.enable_progress_bar()
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One configuration with the tokens it is asked about."""

    seed: int
    config: ModelConfig
    batch: int
    cuts: tuple[int, ...]  # ends of the chunks of a cached run; the last is the length

    def __str__(self) -> str:
        return f"{self.seed}-{'.'.join(map(str, self.config.layer_ratios))}-{self.cuts[-1]}"


def make_case(seed: int) -> Case:
    """Draw a configuration: Flash-like when the seed is even, Pro-like when odd."""
    rng = random.Random(seed)
    heavy = rng.choice((8, 8, 16, 32, 128))
    pairs = rng.randint(1, 2)
    start = (0, 0)[: rng.randint(1, 2)] if seed % 2 == 0 else (heavy,) * rng.randint(1, 2)
    ratios = start + (4, heavy) * pairs + (4,) * rng.randint(0, 1)
    head_dim = rng.choice((16, 32, 64))
    rope = rng.choice((8, 16))
    heads = rng.choice((2, 4, 8))
    config = ModelConfig(
        vocab_size=rng.choice((67, 128, 160)),
        hidden_size=rng.choice((32, 48, 64)),
        num_hidden_layers=len(ratios),
        num_attention_heads=heads,
        head_dim=head_dim,
        qk_rope_head_dim=rope,
        q_lora_rank=rng.choice((16, 24, 40)),
        o_groups=rng.choice((1, 2)),
        o_lora_rank=rng.choice((8, 16, 24)),
        sliding_window=rng.choice((4, 16, 31, 128)),
        compress_ratios=(*ratios, 0),
        index_n_heads=rng.choice((16, 24, 32)),
        index_head_dim=rng.choice((16, 32)),
        index_topk=rng.choice((1, 4, 7, 16)),
        n_routed_experts=rng.choice((4, 8, 13)),
        num_experts_per_tok=rng.randint(1, 4),
        moe_intermediate_size=rng.choice((16, 32)),
        num_hash_layers=rng.randint(0, len(ratios)),
        routed_scaling_factor=rng.choice((1.0, 1.5, 2.5)),
        swiglu_limit=rng.choice((0.5, 1.0, 10.0)),
        hc_sinkhorn_iters=rng.choice((3, 20)),
        rope_scaling=RopeScaling(original_max_position_embeddings=rng.choice((64, 1024)))
        if rng.random() < 0.8
        else None,
        num_nextn_predict_layers=rng.randint(0, 1),
    )
    length = rng.choice((1, 2, 3, 5, rng.randint(1, 200), rng.randint(60, 200), rng.randint(100, 200)))
    decode = min(length - 1, rng.randint(0, 12))
    inner = sorted(rng.sample(range(1, length - decode + 1), min(3, length - decode)))
    cuts = sorted({*inner, *range(length - decode, length + 1)} - {0})
    return Case(seed, config, rng.randint(1, 2), tuple(cuts))


def randomise(model: Transformer, seed: int) -> None:
    """Fill every tensor so that no mechanism is switched off (architecture notes, oracle settings)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor, _ in model.released_tensors():
            if name.endswith("tid2eid"):
                order = torch.rand(len(tensor), model.config.n_routed_experts, generator=generator).argsort(-1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith(("_base", "attn_sink", ".ape")):
                tensor.copy_(0.5 * normal(tensor))
            elif name.endswith("_scale"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("gate.bias"):
                tensor.copy_(0.3 * normal(tensor))
            elif name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * normal(tensor))
            else:
                tensor.copy_(normal(tensor) / tensor.shape[-1] ** 0.5)


def random_model(case: Case) -> Transformer:
    model = Transformer(case.config)
    randomise(model, case.seed)
    return model.eval()


def load_oracle(path: Path) -> Any:
    """Load our checkpoint there, in float32, with no missing and no unexpected key."""
    oracle, info = transformers().DeepseekV4ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    return oracle.eval()


class Margins:
    """Distance between the last choice taken and the first left, for every router and indexer of the oracle."""

    def __init__(self, oracle: nn.Module, topk: int) -> None:
        self.smallest: list[Tensor] = []  # each (B * S,)
        for name, module in oracle.named_modules():
            if name.endswith("mlp.gate") and hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._router)
            if name.endswith("indexer"):
                module.scorer.register_forward_hook(self._keep_scores)
                module.register_forward_hook(self._indexer)
        self._topk = topk
        self._scores = torch.empty(0)

    def _router(self, module: Any, _: object, output: tuple[Tensor, ...]) -> None:
        scores = module.score_fn(output[0]) + module.e_score_correction_bias
        if scores.shape[-1] > module.top_k:
            best = scores.topk(module.top_k + 1, -1).values
            self.smallest.append(best[:, -2] - best[:, -1])

    def _keep_scores(self, module: object, _: object, output: Tensor) -> None:
        self._scores = output

    def _indexer(self, module: object, inputs: tuple[Any, ...], output: Tensor) -> None:
        positions = inputs[2]
        entries = self._scores.shape[-1]
        if entries <= self._topk:
            return
        hidden = torch.arange(entries) >= ((positions + 1) // 4).unsqueeze(-1)
        best = self._scores.masked_fill(hidden, -torch.inf).topk(self._topk + 1, -1).values
        gap = best[..., -2] - best[..., -1]  # inf where fewer entries are visible than taken, nan where both are hidden
        self.smallest.append(gap.nan_to_num(nan=torch.inf).flatten())

    def ties(self, shape: torch.Size) -> Tensor:
        """Bool (B, S): some choice at this position is closer than TIE_MARGIN."""
        tied = torch.zeros(shape, dtype=torch.bool)
        for gap in self.smallest:
            tied |= (gap < TIE_MARGIN).view(shape)
        return tied


@torch.no_grad()
def compare(model: Transformer, oracle: Any, case: Case) -> tuple[int, int]:
    """Assert equal logits in one pass and chunk by chunk; return (positions, positions left out as ties)."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(case.config.vocab_size, (case.batch, case.cuts[-1]), generator=generator)
    margins = Margins(oracle, case.config.index_topk)
    wanted = oracle(ids, use_cache=False).logits
    tied = margins.ties(ids.shape)
    cache, past = ContiguousCache(case.config), transformers().DynamicCache(config=oracle.config)
    chunks, oracle_chunks = [], []
    for begin, end in zip((0, *case.cuts), case.cuts, strict=False):
        chunks.append(model(ids[:, begin:end], cache))
        oracle_chunks.append(oracle(ids[:, begin:end], past_key_values=past, use_cache=True).logits)
    assert cache.position == case.cuts[-1]
    found = {
        "one pass": (model(ids), wanted),
        "chunks": (torch.cat(chunks, 1), wanted),
        "chunks on both sides": (torch.cat(chunks, 1), torch.cat(oracle_chunks, 1)),
    }
    for what, (ours, theirs) in found.items():
        difference = (ours - theirs).abs().amax(-1).masked_fill(tied, 0.0)
        worst = int(difference.argmax())
        assert float(difference.max()) <= TOLERANCE, (
            f"{what}: {float(difference.max()):.2e} at {divmod(worst, ids.shape[1])}"
        )
    assert float(wanted.abs().mean()) > 0.05
    return ids.numel(), int(tied.sum())


def run_case(case: Case, path: Path) -> tuple[int, int]:
    model = random_model(case)
    save_model(model, path, exact=True, shard_bytes=300_000)
    return compare(model, load_oracle(path), case)


def test_logits_over_random_configurations(tmp_path: Path) -> None:
    cases = [make_case(seed) for seed in range(CASES)]
    assert len({case.config.layer_ratios for case in cases}) > CASES // 3
    assert {case.config.layer_ratios[0] == 0 for case in cases} == {True, False}
    positions = ties = 0
    for case in cases:
        try:
            more = run_case(case, tmp_path / str(case.seed))
        except AssertionError as error:
            raise AssertionError(f"case {case}: {error}") from error
        positions, ties = positions + more[0], ties + more[1]
    assert positions > 1000
    assert ties <= TIE_SHARE * positions, f"{ties} of {positions} positions are ties"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CASES, MORE))
def test_more_configurations(tmp_path: Path, seed: int) -> None:
    positions, ties = run_case(make_case(seed), tmp_path)
    assert ties <= max(1, positions // 100)


@pytest.mark.parametrize("original_names", [True, False])
@torch.no_grad()
def test_their_checkpoint_loads_here(tmp_path: Path, original_names: bool) -> None:
    """Both spellings of `save_pretrained`: its mixture of released names, and its own with stacked experts."""
    case = make_case(6)
    save_model(random_model(case), tmp_path / "ours", exact=True)
    oracle = load_oracle(tmp_path / "ours")
    oracle.save_pretrained(tmp_path / "theirs", save_original_format=original_names, max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = load_model(tmp_path / "theirs")
    assert model.config.layer_ratios == case.config.layer_ratios
    assert model.config.num_hash_layers == case.config.num_hash_layers
    compare(model, oracle, case)


@torch.no_grad()
def test_their_random_weights_load_here(tmp_path: Path) -> None:
    """A model made there, never touched by our writer."""
    oracle_config = transformers().DeepseekV4Config(
        vocab_size=128, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        head_dim=32, qk_rope_head_dim=8, q_lora_rank=24, o_groups=2, o_lora_rank=16, n_routed_experts=8,
        num_experts_per_tok=2, num_hash_layers=2, compress_ratios=[0, 4, 128, 4, 128, 0, 0], compress_rate_hca=8,
        sliding_window=16, index_n_heads=16, index_head_dim=16, index_topk=4, attn_implementation="eager",
        rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
    )  # fmt: skip
    torch.manual_seed(0)
    oracle = transformers().DeepseekV4ForCausalLM(oracle_config).float().eval()
    for parameter in oracle.parameters():
        parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    oracle.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.layer_ratios == (0, 4, 8, 4, 8, 0)
    case = Case(0, model.config, 2, (30, 41, 60, 76, 77))
    compare(model, oracle, case)


@torch.no_grad()
def test_quantised_checkpoint_loads_there(tmp_path: Path) -> None:
    """FP8 and FP4 as we write them, dequantised there: the same logits as ours in reference mode."""
    case = make_case(6)
    config = dataclasses.replace(case.config, moe_intermediate_size=128, hidden_size=128)
    case = dataclasses.replace(case, config=config)
    save_model(random_model(case), tmp_path)
    compare(load_model(tmp_path), load_dequantised(tmp_path), case)


def load_dequantised(path: Path) -> Any:
    """Load a released FP8/FP4 checkpoint there with every weight expanded to float32."""
    pytest.importorskip("accelerate", reason="transformers expands FP8 only where accelerate is installed")
    settings = transformers().FineGrainedFP8Config(dequantize=True)
    oracle, info = transformers().DeepseekV4ForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=settings,
        output_loading_info=True,
    )
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    return oracle.float().eval()


@pytest.mark.skipif(
    not (NANO / "model.safetensors.index.json").is_file(), reason="models/nano/model.safetensors.index.json is missing"
)
@torch.no_grad()
def test_nano_decodes_the_same_tokens_there() -> None:
    """The bundled model, dequantised there: prefill of 150 tokens, then the same 40 greedy tokens and logits."""
    model, oracle = load_model(NANO), load_dequantised(NANO)
    vocabulary = json.loads((NANO / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (1, 150), generator=torch.Generator().manual_seed(1))
    cache, past = ContiguousCache(model.config), transformers().DynamicCache(config=oracle.config)
    chunk = ids
    tokens: list[int] = []
    for _ in range(40):
        ours = model(chunk, cache)[:, -1]
        theirs = oracle(chunk, past_key_values=past, use_cache=True).logits[:, -1]
        assert float((ours - theirs).abs().max()) <= TOLERANCE
        assert int(ours.argmax()) == int(theirs.argmax())
        chunk = ours.argmax(-1, keepdim=True)
        tokens.append(int(chunk))
    assert len(tokens) == 40
