"""The V4 transformer: one forward for training, prefill and decode over a cache.

Owns the layer plan, the two number modes and the names of the released checkpoint. It knows no optimizer, no
server and no page table. Source: technical report 2; inference/model.py Transformer, Block, MTPBlock.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError, RequestError
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.model.attention import CSA_RATIO, Attention, Indexer, Step
from pelagos.model.cache import Cache, FullSequence, LayerCache
from pelagos.model.experts import Experts, MoE, Router
from pelagos.model.layers import Embedding, Linear, RMSNorm
from pelagos.numerics import FP4_GROUP

MODES = ("reference", "released")
Released = tuple[str, Tensor, str]


class Block(nn.Module):
    """One layer: an attention site and a MoE site, each inside its hyper-connection."""

    def __init__(self, config: ModelConfig, ratio: int, hashed: bool) -> None:
        super().__init__()
        self.config, self.simulate = config, False
        self.attn = Attention(config, ratio)
        self.ffn = MoE(config, hashed)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        streams, rows = config.hc_mult, (2 + config.hc_mult) * config.hc_mult
        for site in ("attn", "ffn"):
            flat = streams * config.hidden_size
            self.register_parameter(f"hc_{site}_fn", nn.Parameter(torch.empty(rows, flat)))
            self.register_parameter(f"hc_{site}_base", nn.Parameter(torch.empty(rows)))
            self.register_parameter(f"hc_{site}_scale", nn.Parameter(torch.empty(3)))

    def forward(
        self, streams: Tensor, step: Step, cache: Cache, index: int, aux: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Return the streams (B, S, n, D) after this layer; `index` is its place in the cache."""
        return self.expert_site(self.attention_site(streams, step, cache.layer(index), aux), step.ids, aux)

    def attention_site(self, streams: Tensor, step: Step, cache: LayerCache, aux: dict[str, Tensor] | None) -> Tensor:
        """Return the streams after the attention site."""
        x, post, comb = self.site_input(streams, "attn", aux)
        return hc.hc_post(self.attn(self.attn_norm(x), step, cache, aux), streams, post, comb)

    def expert_site(self, streams: Tensor, ids: Tensor, aux: dict[str, Tensor] | None, multiple: int = 0) -> Tensor:
        """Return the streams after the MoE site; a `multiple` pads the rows of each expert."""
        x, post, comb = self.site_input(streams, "ffn", aux)
        return hc.hc_post(self.ffn(self.ffn_norm(x), ids, aux, multiple), streams, post, comb)

    def site_input(self, streams: Tensor, site: str, aux: dict[str, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams to the site's input; return it with the weights its output comes back by."""
        fn, base, scale = (getattr(self, f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        c = self.config
        options = {"iters": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps, "ordered": self.simulate}
        x, post, comb = hc.enter(streams, fn, base, scale, **options)
        if aux is not None:
            aux[f"hc_{site}_comb"] = comb
        return x, post, comb


class Collapse(nn.Module):
    """hc_head and the norm behind it; the attribute names follow the owner's checkpoint names."""

    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter
    norm: RMSNorm

    def _add_head(self, config: ModelConfig) -> None:
        n = config.hc_mult
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_head_base = nn.Parameter(torch.empty(n))
        self.hc_head_scale = nn.Parameter(torch.empty(1))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def collapse(self, streams: Tensor, config: ModelConfig) -> Tensor:
        """Collapse streams (B, S, n, D) to the normed vector (B, S, D) the vocabulary head reads."""
        eps = {"eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
        return self.norm(hc.hc_head(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, **eps))


class MTPBlock(Block, Collapse):
    """The draft layer: reads the backbone's streams and the next token, predicts the token after it."""

    def __init__(self, config: ModelConfig) -> None:
        Block.__init__(self, config, 0, False)
        self.e_proj = Linear(config.hidden_size, config.hidden_size, "fp8")
        self.h_proj = Linear(config.hidden_size, config.hidden_size, "fp8")
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._add_head(config)

    def enter(self, embedded: Tensor, streams: Tensor) -> Tensor:
        """Join next-token embeddings (B, S, D) with the backbone's streams (B, S, n, D)."""
        return self.e_proj(self.enorm(embedded)).unsqueeze(2) + self.h_proj(self.hnorm(streams))


class Transformer(Collapse):
    """A DeepSeek-V4 model in one of two number modes.

    `reference` runs without quantisation simulation; `released` simulates FP8 KV, FP4 indexer operands and FP8
    activations as the official code does. `dtype` is both the parameters' and the carrier's. With
    `master_weights` the parameters are float32 masters quantised on the fly (training).
    """

    def __init__(
        self, config: ModelConfig, *, mode: str = "reference", dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            table = torch.empty(config.vocab_size, config.hidden_size)
            self.embed = Embedding(config.vocab_size, config.hidden_size, _weight=table)
            self.layers = nn.ModuleList(
                Block(config, ratio, index < config.num_hash_layers) for index, ratio in enumerate(config.layer_ratios)
            )
            self._add_head(config)
            self.head = Linear(config.hidden_size, config.vocab_size, "bf16")
            self.mtp = nn.ModuleList(MTPBlock(config) for _ in range(config.num_nextn_predict_layers))
        self.to(dtype)
        self.carrier = dtype
        self.mode = mode
        self.set_mode(mode)

    @property
    def blocks(self) -> list[Block]:
        """The backbone's layers in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def set_mode(self, mode: str, *, master_weights: bool = False) -> None:
        """Choose the number mode; `master_weights` quantises weights on the fly (training)."""
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        size = self.config.index_head_dim
        if mode == "released" and CSA_RATIO in self.config.layer_ratios and (size % FP4_GROUP or size & (size - 1)):
            raise ConfigError(
                f"index_head_dim={size}: released mode rotates index keys by Hadamard and rounds them to FP4, "
                f"expected a power of two >= {FP4_GROUP}; mode='reference' takes any"
            )
        self.mode = mode
        for module in self.modules():
            if isinstance(module, (Linear, Experts, Router, Attention, Indexer, Block)):
                module.simulate = mode == "released"
            if isinstance(module, (Linear, Experts)):
                module.master = master_weights

    def forward(self, ids: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Return float32 logits (B, S, V) for ids (B, S) int64, or (B, 1, V) with `last_only`.

        With a cache the tokens follow those it holds. Raises RequestError for ids that are not int64 (B, S >= 1)
        within the vocabulary, CapacityError for more tokens than the cache holds.
        """
        self._check(ids)
        cache = cache if cache is not None else FullSequence(self.config.sliding_window)
        cache.check_room(ids.shape[1])
        streams = self.run(self.step(ids, start=cache.position), cache)
        hidden = self.collapse(streams[:, -1:] if last_only else streams, self.config)
        cache.advance(ids.shape[1])
        return self.logits(hidden)

    def step(
        self, ids: Tensor, *, start: int = 0, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Step:
        """Describe one forward over ids (B, S); packed samples bring positions and segments (B, S)."""
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device).unsqueeze(0)
        return Step(self.config, ids, start, positions, segments)

    def run(self, step: Step, cache: Cache, aux: list[dict[str, Tensor]] | None = None) -> Tensor:
        """Return the backbone's streams (B, S, n, D); `aux` receives one dict a layer."""
        embedded = self.embed(step.ids).to(self.carrier)
        streams = embedded.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for index, layer in enumerate(self.layers):
            notes = None if aux is None else {}
            streams = layer(streams, step, cache, index, notes)
            if aux is not None and notes is not None:
                aux.append(notes)
        return streams

    def draft(
        self, streams: Tensor, next_ids: Tensor, step: Step, cache: Cache, aux: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Return the MTP block's normed vectors (B, S, D): position t pairs streams t with token t + 1.

        Raises ConfigError for a model without an MTP block.
        """
        if not len(self.mtp):
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers=0)")
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        entered = block.enter(self.embed(next_ids).to(self.carrier), streams)
        inner = Step(self.config, next_ids, step.start, step.positions, step.segments)
        return block.collapse(block(entered, inner, cache, len(self.layers), aux), self.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (..., V) of normed vectors (..., D); the product runs in float32 as released."""
        return functional.linear(hidden.float(), self.head.weight.float())

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] == 0:
            raise RequestError(f"ids: expected int64 (batch, length >= 1), got {ids.dtype} {tuple(ids.shape)}")
        if (
            ids.device.type == "cpu"
            and ids.numel()
            and (int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size)
        ):
            raise RequestError(f"ids: expected 0 <= id < vocab_size={self.config.vocab_size}, got {int(ids.max())}")

    def released_tensors(self, *, streamed: bool = True) -> Iterator[Released]:
        """Yield (official name, live tensor or view, released format) for every tensor of the checkpoint.

        `streamed` experts are read from their file one by one.
        """
        for prefix, module in self.named_modules():
            dot = f"{prefix}." if prefix else ""
            if isinstance(module, Experts):
                yield from module.released(dot) if streamed or not module.streamed else ()
                continue
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield dot + name, tensor, _release_format(module, name)

    def set_format(self, name: str, stored: str) -> None:
        """Record how a weight was stored, so that only FP8 and FP4 products simulate their activations."""
        path = name.rsplit(".", 1)[0]
        if ".experts." in path:
            path = path.split(".experts.")[0] + ".experts"
        module = self.get_submodule(path) if path != name else self
        if isinstance(module, (Linear, Experts)):
            module.stored = stored


def _release_format(module: nn.Module, name: str) -> str:
    if isinstance(module, Linear):
        return module.release
    if isinstance(module, Router) and name != "weight":
        return "i64" if name == "tid2eid" else "f32"
    if name.startswith("hc_") or name in ("attn_sink", "ape"):
        return "f32"
    return "bf16"
