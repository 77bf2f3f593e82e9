"""A model's weights in device memory as released: packed FP4, FP8, BF16, merged as the kernels of the step read them.

Every tensor of the checkpoint has a place under its released name, a slice of a merged one; nothing is held twice.
Source: released checkpoint names and formats; docs/log/0006-captured-step.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pelagos import cost, numerics
from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError
from pelagos.kernels.cache_write import CacheWeights
from pelagos.kernels.fp4_experts import MAX_SCALE_BYTE
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.kernels.skinny_gemm import BLOCK, TALL
from pelagos.model.streaming import ExpertBlocks, expert_shapes

_SITE_ROWS, _STREAMS = 24, 4
_FP8_SPREAD, _FP4_SPREAD = 16.0, 2.93  # root mean square of random codes
_EXPERT = re.compile(r"\.experts\.\d+\.")
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
    bases: tuple[Tensor, Tensor] | None = None  # base bytes of w13 and w2, for prompts
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
    layers: list[LayerWeights] = field(init=False)
    draft: DraftWeights | None = None
    embed: Tensor = field(init=False)
    head: Tensor = field(init=False)
    head_site: SiteWeights = field(init=False)
    mode: ClassVar[str] = "released"
    carrier: ClassVar[torch.dtype] = torch.bfloat16
    _released: dict[str, cost.TensorGroup] = field(init=False)
    _whole: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        check_shape(config)
        released = cost.inventory(dataclasses.replace(config, extra={}), draft=True)
        self._released = {group.name: group for group in released}
        self.embed, self.head = self._plain("embed.weight"), self._plain("head.weight")
        self.layers = [self._layer(f"layers.{index}.", index, ratio) for index, ratio in enumerate(config.layer_ratios)]
        self.head_site = self._site("hc_head", "norm.weight")
        if config.num_nextn_predict_layers:
            layer = self._layer("mtp.0.", config.num_hidden_layers, 0)
            e_proj, h_proj = (self._fp8(f"mtp.0.{name}.weight") for name in ("e_proj", "h_proj"))
            enorm, hnorm = (self._plain(f"mtp.0.{name}.weight") for name in ("enorm", "hnorm"))
            head_site = self._site("mtp.0.hc_head", "mtp.0.norm.weight")
            self.draft = DraftWeights(layer, head_site, e_proj, h_proj, enorm, hnorm)

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
                for part in values.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
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
        shape = self._released[_EXPERT.sub(".experts.*.", name)].shape
        if tuple(values.shape) != shape:
            raise CheckpointError(f"{name}: shape {tuple(values.shape)}, expected {shape}")
        if place.scales is None:
            place.values.copy_(values)
            back = place.values
        else:
            codes, scales = numerics.encode_weight(values, place.format)
            place.values.copy_(codes.view(torch.uint8))
            place.scales.copy_(scales.view(torch.uint8))
            back = numerics.decode_weight(codes, scales, place.format)
            if place.format == "fp4" and not 1 <= int(place.scales.min()) <= int(place.scales.max()) <= MAX_SCALE_BYTE:
                raise CheckpointError(f"{name}: scales beyond 2, which the kernels of FP4 experts do not take")
        if not torch.equal(back.to(values.dtype), values):
            raise CheckpointError(
                f"{name}: {place.format} does not hold its values; the captured step runs released ones"
            )

    def _plain(self, *names: str, pad: int = 1) -> Tensor:
        """One tensor of the named ones below each other, its rows padded with zeros to a multiple."""
        groups = [self._released[name] for name in names]
        counts, format = [group.shape[0] for group in groups], groups[0].format
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[format]
        rows = sum(counts) + -sum(counts) % pad
        whole = torch.zeros((rows, *groups[0].shape[1:]), dtype=dtype, device=self.device)
        self._whole.append(("norm" if "norm" in names[0] else format, whole, None))
        for name, part in zip(names, whole[: sum(counts)].split(counts), strict=True):
            self.places[name] = Place(format, part)
        return whole

    def _found(self, *names: str) -> list[str]:
        """Those of the names that this model has."""
        return [name for name in names if name in self._released]

    def _fp8(self, *names: str) -> Fp8:
        """One weight of the named ones below each other."""
        counts, depth = [self._released[name].shape[0] for name in names], self._released[names[0]].shape[1]
        weight = Fp8(*(torch.zeros((sum(counts) // n, depth // n), dtype=torch.uint8, device=self.device)
                       for n in (1, BLOCK)))  # fmt: skip
        self._whole.append(("fp8", weight.codes, weight.scales))
        parts = weight.codes.split(counts), weight.scales.split([count // BLOCK for count in counts])
        self.places |= {name: Place("fp8", *part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
        return weight

    def _routed(self, prefix: str, layer: int) -> tuple[Fp8, Fp8]:
        """The routed experts' w13 and w2: stacked tensors, or blocks."""
        c = self.config
        if self.blocks is None:
            whole = [torch.zeros((c.n_routed_experts, *shape), dtype=torch.uint8, device=self.device)
                     for shape in expert_shapes(c)]  # fmt: skip
            self._whole += [("fp4", whole[0], whole[1]), ("fp4", whole[2], whole[3])]
            each = list(zip(*(part.unbind(0) for part in whole), strict=True))
        else:
            whole = self.blocks.first()
            each = [self.blocks.parts(layer, expert) for expert in range(c.n_routed_experts)]
            self._whole += [("fp4", part[at], part[at + 1]) for part in each for at in (0, 2)]
        for expert, (codes, scales, *second) in enumerate(each):
            parts = zip(("w1", "w3", "w2"), (*codes.chunk(2), second[0]), (*scales.chunk(2), second[1]), strict=True)
            for name, values, scale in parts:
                self.places[f"{prefix}{expert}.{name}.weight"] = Place("fp4", values, scale)
        return Fp8(*whole[:2]), Fp8(*whole[2:])

    def _site(self, prefix: str, norm: str) -> SiteWeights:
        """A site, or the collapse before the vocabulary head as one of which only the weights of the streams count."""
        fn, base, scale = (self._plain(f"{prefix}_{name}", pad=pad)
                           for name, pad in (("fn", _SITE_ROWS), ("base", _SITE_ROWS), ("scale", 3)))  # fmt: skip
        return SiteWeights(fn, base, scale, self._plain(norm))

    def _layer(self, prefix: str, index: int, ratio: int) -> LayerWeights:
        attn, ffn, indexer = f"{prefix}attn.", f"{prefix}ffn.", f"{prefix}attn.indexer."
        pools = {"": f"{attn}compressor.", "index_": f"{indexer}compressor."}
        cache = {f"{name}{part}": self._plain(f"{path}{part}{end}")
                 for name, path in pools.items() if self._found(f"{path}ape")
                 for part, end in (("ape", ""), ("norm", ".weight"))}  # fmt: skip
        wide = self._found(*(f"{path}{name}.weight" for path in pools.values() for name in ("wkv", "wgate")),
                           f"{indexer}weights_proj.weight")  # fmt: skip
        w13, w2 = self._routed(f"{ffn}experts.", index)
        return LayerWeights(
            ratio=ratio,
            attn_site=self._site(f"{prefix}hc_attn", f"{prefix}attn_norm.weight"),
            ffn_site=self._site(f"{prefix}hc_ffn", f"{prefix}ffn_norm.weight"),
            first=self._fp8(f"{attn}wq_a.weight", f"{attn}wkv.weight"),
            first_wide=self._plain(*wide, pad=TALL) if wide else self.embed[:0],
            cache=CacheWeights(self._plain(f"{attn}q_norm.weight"), self._plain(f"{attn}kv_norm.weight"), **cache),
            second=self._fp8(f"{attn}wq_b.weight", *self._found(f"{indexer}wq_b.weight")),
            sink=self._plain(f"{attn}attn_sink"),
            wo_a=self._fp8(f"{attn}wo_a.weight"),
            wo_b=self._fp8(f"{attn}wo_b.weight"),
            gate=self._plain(f"{ffn}gate.weight", pad=TALL),
            bias=self._plain(*name) if (name := self._found(f"{ffn}gate.bias")) else None,
            table=self._plain(*name) if (name := self._found(f"{ffn}gate.tid2eid")) else None,
            shared13=self._fp8(f"{ffn}shared_experts.w1.weight", f"{ffn}shared_experts.w3.weight"),
            shared2=self._fp8(f"{ffn}shared_experts.w2.weight"),
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
