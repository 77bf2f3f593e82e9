"""A model's weights in device memory as released: packed FP4, FP8, BF16, merged as the kernels of the step read them.

Every tensor of the checkpoint has a place under its released name, a slice of a merged one; nothing is held twice.
Source: released checkpoint names and formats; docs/log/0006-captured-step.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError
from pelagos.kernels.cache_write import CacheWeights
from pelagos.kernels.fp4_experts import MAX_SCALE_BYTE
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.kernels.skinny_gemm import BLOCK, TALL
from pelagos.model.attention import CSA_RATIO
from pelagos.model.expert_blocks import ExpertBlocks

_SITE_ROWS, _STREAMS = 24, 4
_FP8_SPREAD, _FP4_SPREAD = 16.0, 2.93  # root mean square of random codes
_RANDOM_BLOCK = 1 << 28  # bytes of random codes that are repeated from tensor to tensor


class Fp8(NamedTuple):
    """A weight (O, I) of E4M3 codes and its UE8M0 block scales (O/128, I/128), both uint8."""

    codes: Tensor
    scales: Tensor


class SiteWeights(NamedTuple):
    """A hyper-connection's fn (24, 4D), base (24,), scale (3,) float32, and the norm (D,) behind it."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: what each launch of the step reads."""

    ratio: int
    attn_site: SiteWeights
    ffn_site: SiteWeights
    first: Fp8  # wq_a, wkv
    first_wide: Tensor  # the compressors' wkv and wgate, weights_proj; bfloat16 rows padded to 64
    cache: CacheWeights
    second: Fp8  # wq_b, the indexer's wq_b
    sink: Tensor
    wo_a: Fp8
    wo_b: Fp8
    gate: Tensor  # (E padded to 64, D) bfloat16
    bias: Tensor | None
    table: Tensor | None
    shared13: Fp8
    shared2: Fp8
    w13: Fp8  # (E, 2F, D/2) packed E2M1 and (E, 2F, D/32); of blocks the first, (1, ...)
    w2: Fp8
    place: Tensor | None = None  # (E,) int64 offsets of the experts' blocks, where they are in blocks


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """What the draft layer has besides a layer's."""

    layer: LayerWeights
    head_site: SiteWeights
    e_proj: Fp8
    h_proj: Fp8
    enorm: Tensor
    hnorm: Tensor


@dataclass(slots=True)
class Place:
    """Where a tensor of the checkpoint goes: its format and a view of its values, and of its scales if quantised."""

    format: str
    values: Tensor
    scales: Tensor | None = None
    filled: bool = False


@dataclass(slots=True)
class Weights:
    """All weights of `config` on `device`, zeros at first; ConfigError for shapes that the kernels do not take.

    With `blocks` the routed experts lie there.
    """

    config: ModelConfig
    device: torch.device
    blocks: ExpertBlocks | None = None
    places: dict[str, Place] = field(default_factory=dict)
    layers: list[LayerWeights] = field(default_factory=list)
    draft: DraftWeights | None = None
    embed: Tensor = field(init=False)
    head: Tensor = field(init=False)
    head_site: SiteWeights = field(init=False)
    mode: ClassVar[str] = "released"
    carrier: ClassVar[torch.dtype] = torch.bfloat16
    _whole: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        check_shape(config)
        d, vocab = config.hidden_size, config.vocab_size
        self.embed = self._plain("bf16", {"embed.weight": (vocab, d)})
        self.head = self._plain("bf16", {"head.weight": (vocab, d)})
        for index, ratio in enumerate(config.layer_ratios):
            self.layers.append(self._layer(f"layers.{index}.", index, ratio, hashed=index < config.num_hash_layers))
        self.head_site = self._head_site("")
        if config.num_nextn_predict_layers:
            layer = self._layer("mtp.0.", config.num_hidden_layers, 0, hashed=False)
            e_proj, h_proj = (self._fp8({f"mtp.0.{name}.weight": d}, d) for name in ("e_proj", "h_proj"))
            enorm, hnorm = (self._plain("bf16", {f"mtp.0.{name}.weight": (d,)}) for name in ("enorm", "hnorm"))
            self.draft = DraftWeights(layer, self._head_site("mtp.0."), e_proj, h_proj, enorm, hnorm)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on the device."""
        return sum(tensor.nbytes for tensor in self.tensors() if tensor.device.type == self.device.type)

    def tensors(self) -> list[Tensor]:
        """All tensors as they lie there, codes and scales."""
        return [t for _, values, scales in self._whole for t in (values, scales) if t is not None]

    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """Return `base_bytes` of each layer's routed w13 and w2; ConfigError for scales the prompts' kernels refuse."""
        if self.blocks is not None:
            return self.blocks.bases()[: len(self.layers)]
        return [(base_bytes(*layer.w13), base_bytes(*layer.w2)) for layer in self.layers]

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> Weights:
        """Take every tensor's values by released name, encoded without loss; return self.

        Raises CheckpointError for unknown or missing names, other shapes, and values that the format does not hold.
        """
        for name, values in tensors:
            place = self.places.get(name)
            if place is None:
                raise CheckpointError(f"{name}: not a tensor of this model")
            self._put(name, place, values.detach().to(self.device))
        missing = [name for name, place in self.places.items() if not place.filled]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors are missing, {missing[0]!r} first")
        return self

    def fill_random(self, seed: int = 0) -> Weights:
        """Make weights of sane scale in place, all codes finite; return self."""
        generator = torch.Generator(self.device).manual_seed(seed)
        options = {"generator": generator, "device": self.device}
        normal = torch.empty(_RANDOM_BLOCK // 4, device=self.device).normal_(0, _FP8_SPREAD, generator=generator)
        normal = normal.to(torch.float8_e4m3fn).view(torch.uint8)
        anything = torch.randint(-(2**63), 2**63 - 1, (_RANDOM_BLOCK // 8,), dtype=torch.int64, **options).view(
            torch.uint8
        )
        for kind, values, scales in self._whole:
            depth = values.shape[-1] * (2 if kind == "fp4" else 1)
            if scales is not None:
                block, spread = (anything, _FP4_SPREAD) if kind == "fp4" else (normal, _FP8_SPREAD)
                flat = values.view(-1)
                for begin in range(0, flat.numel(), block.numel()):
                    part = flat[begin : begin + block.numel()]
                    part.copy_(block[: part.numel()])
                scales.fill_(127 + round(math.log2(depth**-0.5 / spread)))
            elif kind == "i64":
                values.random_(0, self.config.n_routed_experts, generator=generator)
            elif kind == "norm":
                values.fill_(1.0)
            elif kind == "f32" and values.dim() == 1:
                values.normal_(0, 0.1, generator=generator)
            else:
                values.normal_(0, depth**-0.5, generator=generator)
        return self

    def _put(self, name: str, place: Place, values: Tensor) -> None:
        place.filled = True
        if place.scales is None:
            shape = tuple(place.values.shape)
        else:
            shape = (*place.values.shape[:-1], place.values.shape[-1] * (2 if place.format == "fp4" else 1))
        if tuple(values.shape) != shape:
            raise CheckpointError(f"{name}: shape {tuple(values.shape)}, expected {shape}")
        if place.scales is None:
            place.values.copy_(values)
            back = place.values
        elif place.format == "fp8":
            codes, scales = numerics.encode_fp8(values, numerics.FP8_BLOCK)
            place.values.copy_(codes.view(torch.uint8))
            place.scales.copy_(scales.view(torch.uint8))
            back = numerics.decode_fp8(codes, scales, numerics.FP8_BLOCK)
        else:
            codes, scales = numerics.encode_fp4(values)
            place.values.copy_(codes.view(torch.uint8))
            place.scales.copy_(scales.view(torch.uint8))
            back = numerics.decode_fp4(codes, scales)
            if int(place.scales.min()) < 1 or int(place.scales.max()) > MAX_SCALE_BYTE:
                raise CheckpointError(f"{name}: scales beyond 2, which the kernels of FP4 experts do not take")
        if not torch.equal(back.to(values.dtype), values):
            raise CheckpointError(
                f"{name}: {place.format} does not hold its values; the captured step runs released ones"
            )

    def _new(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.zeros(shape, dtype=dtype, device=self.device)
        self._whole.append((kind, values, None))
        return values

    def _plain(self, format: str, rows: dict[str, tuple[int, ...]], pad: int = 1) -> Tensor:
        """One tensor of the named ones below each other, its rows padded with zeros to a multiple."""
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[format]
        first = next(iter(rows.values()))
        total = sum(shape[0] for shape in rows.values())
        kind = "norm" if "norm" in next(iter(rows)) else format
        whole, at = self._new(kind, (total + -total % pad, *first[1:]), dtype), 0
        for name, shape in rows.items():
            self.places[name] = Place(format, whole[at : at + shape[0]])
            at += shape[0]
        return whole

    def _fp8(self, rows: dict[str, int], depth: int) -> Fp8:
        total = sum(rows.values())
        codes, scales = (
            torch.zeros((total // n, depth // n), dtype=torch.uint8, device=self.device) for n in (1, BLOCK)
        )
        weight = Fp8(codes, scales)
        self._whole.append(("fp8", codes, scales))
        at = 0
        for name, count in rows.items():
            blocks = weight.scales[at // BLOCK : (at + count) // BLOCK]
            self.places[name] = Place("fp8", weight.codes[at : at + count], blocks)
            at += count
        return weight

    def _routed(self, prefix: str, layer: int) -> tuple[Fp8, Fp8]:
        """The routed experts' w13 and w2: stacked tensors, or blocks."""
        c, d, inner = self.config, self.config.hidden_size, self.config.moe_intermediate_size
        if self.blocks is None:
            shapes = [(2 * inner, d // 2), (2 * inner, d // numerics.FP4_GROUP),
                      (d, inner // 2), (d, inner // numerics.FP4_GROUP)]  # fmt: skip
            whole = [
                torch.zeros((c.n_routed_experts, *shape), dtype=torch.uint8, device=self.device) for shape in shapes
            ]
            self._whole += [("fp4", whole[0], whole[1]), ("fp4", whole[2], whole[3])]
            each = list(zip(*(part.unbind(0) for part in whole), strict=True))
        else:
            whole = self.blocks.first()
            each = [self.blocks.parts(layer, expert) for expert in range(c.n_routed_experts)]
            self._whole += [("fp4", part[at], part[at + 1]) for part in each for at in (0, 2)]
        for expert, (codes, scales, codes2, scales2) in enumerate(each):
            own = f"{prefix}{expert}."
            for name, values, scale in zip(("w1", "w3"), codes.split(inner), scales.split(inner), strict=True):
                self.places[f"{own}{name}.weight"] = Place("fp4", values, scale)
            self.places[f"{own}w2.weight"] = Place("fp4", codes2, scales2)
        return Fp8(*whole[:2]), Fp8(*whole[2:])

    def _site(self, prefix: str, norm: str) -> SiteWeights:
        width = _STREAMS * self.config.hidden_size
        shapes = {"fn": (_SITE_ROWS, width), "base": (_SITE_ROWS,), "scale": (3,)}
        fn, base, scale = (self._plain("f32", {f"{prefix}_{name}": shape}) for name, shape in shapes.items())
        return SiteWeights(fn, base, scale, self._plain("bf16", {norm: (self.config.hidden_size,)}))

    def _head_site(self, prefix: str) -> SiteWeights:
        """The collapse before the vocabulary head, as a site of which only the four weights of the streams count."""
        width, n = _STREAMS * self.config.hidden_size, _STREAMS
        padded = [(n, (_SITE_ROWS, width)), (n, (_SITE_ROWS,)), (1, (3,))]
        fn, base, scale = whole = [self._new("f32", shape, torch.float32) for _, shape in padded]
        for name, (rows, _), values in zip(("fn", "base", "scale"), padded, whole, strict=True):
            self.places[f"{prefix}hc_head_{name}"] = Place("f32", values[:rows])
        return SiteWeights(fn, base, scale, self._plain("bf16", {f"{prefix}norm.weight": (self.config.hidden_size,)}))

    def _layer(self, prefix: str, index: int, ratio: int, *, hashed: bool) -> LayerWeights:
        c, d, attn, ffn = self.config, self.config.hidden_size, f"{prefix}attn.", f"{prefix}ffn."
        width, inner, heads = c.head_dim, c.moe_intermediate_size, c.num_attention_heads
        wide: dict[str, tuple[int, int]] = {}
        cache: dict[str, Tensor | None] = {}
        second = {f"{attn}wq_b.weight": heads * width}
        for name, path, size in (("", "compressor.", width), ("index_", "indexer.compressor.", c.index_head_dim)):
            if ratio and (not name or ratio == CSA_RATIO):
                span = size * (1 + (ratio == CSA_RATIO))
                wide |= {f"{attn}{path}{part}.weight": (span, d) for part in ("wkv", "wgate")}
                cache[f"{name}ape"] = self._plain("f32", {f"{attn}{path}ape": (ratio, span)})
                cache[f"{name}norm"] = self._plain("bf16", {f"{attn}{path}norm.weight": (size,)})
        if ratio == CSA_RATIO:
            wide[f"{attn}indexer.weights_proj.weight"] = (c.index_n_heads, d)
            second[f"{attn}indexer.wq_b.weight"] = c.index_n_heads * c.index_head_dim
        shared = f"{ffn}shared_experts."
        gate_pad = -c.n_routed_experts % TALL
        w13, w2 = self._routed(f"{ffn}experts.", index)
        return LayerWeights(
            ratio=ratio,
            attn_site=self._site(f"{prefix}hc_attn", f"{prefix}attn_norm.weight"),
            ffn_site=self._site(f"{prefix}hc_ffn", f"{prefix}ffn_norm.weight"),
            first=self._fp8({f"{attn}wq_a.weight": c.q_lora_rank, f"{attn}wkv.weight": width}, d),
            first_wide=self._plain("bf16", wide, TALL) if wide else self.embed[:0],
            cache=CacheWeights(
                self._plain("bf16", {f"{attn}q_norm.weight": (c.q_lora_rank,)}),
                self._plain("bf16", {f"{attn}kv_norm.weight": (width,)}), **cache,
            ),
            second=self._fp8(second, c.q_lora_rank),
            sink=self._plain("f32", {f"{attn}attn_sink": (heads,)}),
            wo_a=self._fp8({f"{attn}wo_a.weight": c.o_groups * c.o_lora_rank}, heads * width // c.o_groups),
            wo_b=self._fp8({f"{attn}wo_b.weight": d}, c.o_groups * c.o_lora_rank),
            gate=self._plain("bf16", {f"{ffn}gate.weight": (c.n_routed_experts, d)}, c.n_routed_experts + gate_pad),
            bias=None if hashed else self._plain("f32", {f"{ffn}gate.bias": (c.n_routed_experts,)}),
            table=self._plain("i64", {f"{ffn}gate.tid2eid": (c.vocab_size, c.num_experts_per_tok)}) if hashed else None,
            shared13=self._fp8({f"{shared}w1.weight": inner, f"{shared}w3.weight": inner}, d),
            shared2=self._fp8({f"{shared}w2.weight": d}, inner),
            w13=w13, w2=w2, place=None if self.blocks is None else self.blocks.table[index],
        )  # fmt: skip


def check_shape(config: ModelConfig) -> None:
    """Raise ConfigError unless the captured step's kernels take this model's shapes."""
    c = config
    whole = {
        "hidden_size": c.hidden_size, "q_lora_rank": c.q_lora_rank, "head_dim": c.head_dim,
        "o_lora_rank": c.o_lora_rank, "moe_intermediate_size": c.moe_intermediate_size,
        "index heads * width": c.index_n_heads * c.index_head_dim,
    }  # fmt: skip
    odd = [f"{name}={value}" for name, value in whole.items() if value % BLOCK]
    if c.expert_dtype != "fp4" or c.hc_mult != _STREAMS or c.qk_rope_head_dim != 64:
        odd.append(f"expert_dtype={c.expert_dtype!r}, hc_mult={c.hc_mult}, qk_rope_head_dim={c.qk_rope_head_dim}")
    if odd:
        raise ConfigError(
            f"captured step: {', '.join(odd)}: expected multiples of {BLOCK}, FP4 experts, 4 streams, 64 rotary ones"
        )
