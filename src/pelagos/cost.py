"""What a V4-architecture model costs: parameters, bytes and FLOPs as exact formulas of its configuration.

Owns every byte and FLOP formula of the house, the V3.2 and GQA-8 yardsticks and the dated price table; imports no
device code. Notation: a ratio of 4 is CSA, 0 a window-only layer, anything else HCA-like. Source: the V4 report
(architecture and efficiency sections), the released checkpoints' tensor lists and cache layouts, the price pages.
"""

import dataclasses
import datetime
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pelagos.config import PRESETS, ModelConfig, local_model, preset
from pelagos.errors import ConfigError

PAGE_TOKENS = 128  # lcm of the released ratios 4 and 128: a page never holds part of a compressed entry
WEIGHT_DTYPES = ("released", "bfloat16", "float32")
GQA8_ROW_BYTES = 2 * 8 * 128 * 2  # K and V of 8 heads of 128 in bf16: one layer, one token
_FP8_BLOCK = 128
_FP4_BLOCK = 32
_Row = TypeVar("_Row")


@dataclass(frozen=True, kw_only=True, slots=True)
class V32Spec:
    """DeepSeek-V3.2 as released: MLA with sparse attention, the yardstick of the V4 efficiency claims."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048


V32 = V32Spec()
Model = ModelConfig | V32Spec


def resolve(model: Model | str | Path) -> tuple[str, Model]:
    """Return (display name, model) for a preset name, `v3.2`, a directory or cached hub id, or a config itself."""
    if isinstance(model, (ModelConfig, V32Spec)):
        return ("v3.2" if isinstance(model, V32Spec) else "config"), model
    name = str(model)
    if name == "v3.2":
        return name, V32
    if name in PRESETS:
        return name, preset(name)
    path = local_model(name)
    if not path.exists():
        known = ", ".join(PRESETS)
        raise ConfigError(f"model {name!r}: expected {known}, v3.2, a directory with config.json or a cached hub id")
    return name, ModelConfig.load(path)


def layer_kind(ratio: int) -> str:
    """Name a layer's kind by its compression ratio: `window`, `csa` or `hca`."""
    return {0: "window", 4: "csa"}.get(ratio, "hca")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """`count` equal tensors of a checkpoint (`*` in the name runs over experts), of which a token uses `active`."""

    part: str
    name: str
    format: str  # fp4, fp8, bf16, f32 or i64
    shape: tuple[int, ...]
    count: int = 1
    active: int = 1

    @property
    def elements(self) -> int:
        """Elements of one of the tensors."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Learned numbers in the whole group; the integer hash table of the router is none."""
        return 0 if self.format == "i64" else self.count * self.elements

    @property
    def active_parameters(self) -> int:
        """Learned numbers one token passes through."""
        return 0 if self.format == "i64" else self.active * self.elements

    @property
    def matmul_flops(self) -> int:
        """FLOPs (2 x multiply-add) of multiplying one token with the group's active matrices."""
        is_matrix = len(self.shape) == 2 and self.name.endswith((".weight", "_fn")) and self.part != "embedding"
        return 2 * self.active_parameters if is_matrix else 0

    def stored(self) -> dict[str, tuple[int, int]]:
        """Return safetensors dtype -> (tensors, bytes) of the group in the released format, scales included."""
        rows, columns = self.shape[0], self.shape[-1]
        one: dict[str, int]
        if self.format == "fp8":
            scales = math.ceil(rows / _FP8_BLOCK) * math.ceil(columns / _FP8_BLOCK)
            one = {"F8_E4M3": self.elements, "F8_E8M0": scales}
        elif self.format == "fp4":
            one = {"I8": rows * math.ceil(columns / 2), "F8_E8M0": rows * math.ceil(columns / _FP4_BLOCK)}
        else:
            dtype, size = {"bf16": ("BF16", 2), "f32": ("F32", 4), "i64": ("I64", 8)}[self.format]
            one = {dtype: size * self.elements}
        return {dtype: (self.count, self.count * size) for dtype, size in one.items()}


def inventory(model: Model, *, draft: bool = False) -> list[TensorGroup]:
    """List every tensor of the backbone under its released name; `draft` appends the MTP block."""
    if isinstance(model, V32Spec):
        return list(_v32_tensors(model))
    table, d = (model.vocab_size, model.hidden_size), model.hidden_size
    groups = [TensorGroup("embedding", "embed.weight", "bf16", table, active=0)]
    for i, ratio in enumerate(model.layer_ratios):
        groups += _layer_tensors(model, f"layers.{i}.", ratio, hashed=i < model.num_hash_layers)
    groups += [*_head_tensors(model, ""), TensorGroup("head", "head.weight", "bf16", table)]
    if draft and has_mtp(model):
        mtp = [*_layer_tensors(model, "mtp.0.", 0, hashed=False), *_head_tensors(model, "mtp.0.")]
        mtp += [TensorGroup("mtp", f"mtp.0.{name}.weight", "fp8", (d, d)) for name in ("e_proj", "h_proj")]
        mtp += [TensorGroup("mtp", f"mtp.0.{name}.weight", "bf16", (d,)) for name in ("enorm", "hnorm")]
        groups += [dataclasses.replace(group, part="mtp") for group in mtp]
    return groups


def has_mtp(config: ModelConfig) -> bool:
    """Say whether the checkpoint carries an MTP block; a `dspark_*` key means another draft, which is not counted."""
    return config.num_nextn_predict_layers > 0 and "dspark_block_size" not in config.extra


def _head_tensors(c: ModelConfig, prefix: str) -> Iterator[TensorGroup]:
    n = c.hc_mult
    for name, shape in (("fn", (n, n * c.hidden_size)), ("base", (n,)), ("scale", (1,))):
        yield TensorGroup("hyper_connections", f"{prefix}hc_head_{name}", "f32", shape)
    yield TensorGroup("norms", f"{prefix}norm.weight", "bf16", (c.hidden_size,))


def _layer_tensors(c: ModelConfig, prefix: str, ratio: int, *, hashed: bool) -> Iterator[TensorGroup]:
    d, n, q = c.hidden_size, c.hc_mult, c.q_lora_rank
    q_dim, o_dim = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    for site in ("attn", "ffn"):
        yield TensorGroup("norms", f"{prefix}{site}_norm.weight", "bf16", (d,))
        for name, shape in (("fn", (n * (n + 2), n * d)), ("base", (n * (n + 2),)), ("scale", (3,))):
            yield TensorGroup("hyper_connections", f"{prefix}hc_{site}_{name}", "f32", shape)
    yield TensorGroup("attention", f"{prefix}attn.attn_sink", "f32", (c.num_attention_heads,))
    for name, format, shape in (
        ("wq_a", "fp8", (q, d)),
        ("q_norm", "bf16", (q,)),
        ("wq_b", "fp8", (q_dim, q)),
        ("wkv", "fp8", (c.head_dim, d)),
        ("kv_norm", "bf16", (c.head_dim,)),
        ("wo_a", "fp8", (o_dim, q_dim // c.o_groups)),
        ("wo_b", "fp8", (d, o_dim)),
    ):
        yield TensorGroup("attention", f"{prefix}attn.{name}.weight", format, shape)
    if ratio:
        yield from _compressor_tensors("compressor", f"{prefix}attn.compressor.", ratio, c.head_dim, d)
    if layer_kind(ratio) == "csa":
        index = f"{prefix}attn.indexer."
        yield TensorGroup("indexer", f"{index}wq_b.weight", "fp8", (c.index_n_heads * c.index_head_dim, q))
        yield TensorGroup("indexer", f"{index}weights_proj.weight", "bf16", (c.index_n_heads, d))
        yield from _compressor_tensors("index_compressor", f"{index}compressor.", ratio, c.index_head_dim, d)
    yield TensorGroup("router", f"{prefix}ffn.gate.weight", "bf16", (c.n_routed_experts, d))
    if hashed:
        table = (c.vocab_size, c.num_experts_per_tok)
        yield TensorGroup("router", f"{prefix}ffn.gate.tid2eid", "i64", table, active=0)
    else:
        yield TensorGroup("router", f"{prefix}ffn.gate.bias", "f32", (c.n_routed_experts,))
    width, experts, used = c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok
    for name, shape in (("w1", (width, d)), ("w2", (d, width)), ("w3", (width, d))):
        routed = f"{prefix}ffn.experts.*.{name}.weight"
        yield TensorGroup("routed_experts", routed, c.expert_dtype, shape, experts, used)
        yield TensorGroup("shared_expert", f"{prefix}ffn.shared_experts.{name}.weight", "fp8", shape)


def _compressor_tensors(part: str, prefix: str, ratio: int, dim: int, d: int) -> Iterator[TensorGroup]:
    wide = 2 * dim if layer_kind(ratio) == "csa" else dim
    yield TensorGroup(part, f"{prefix}ape", "f32", (ratio, wide))
    yield TensorGroup(part, f"{prefix}wkv.weight", "bf16", (wide, d))
    yield TensorGroup(part, f"{prefix}wgate.weight", "bf16", (wide, d))
    yield TensorGroup(part, f"{prefix}norm.weight", "bf16", (dim,))


def _v32_tensors(s: V32Spec) -> Iterator[TensorGroup]:
    d, heads, rope = s.hidden_size, s.num_attention_heads, s.qk_rope_head_dim
    yield TensorGroup("embedding", "embed_tokens.weight", "bf16", (s.vocab_size, d), active=0)
    for i in range(s.num_hidden_layers):
        for part, name, format, shape in (
            ("norms", "input_layernorm", "bf16", (d,)),
            ("norms", "post_attention_layernorm", "bf16", (d,)),
            ("attention", "q_a_proj", "fp8", (s.q_lora_rank, d)),
            ("attention", "q_a_layernorm", "bf16", (s.q_lora_rank,)),
            ("attention", "q_b_proj", "fp8", (heads * (s.qk_nope_head_dim + rope), s.q_lora_rank)),
            ("attention", "kv_a_proj_with_mqa", "fp8", (s.kv_lora_rank + rope, d)),
            ("attention", "kv_a_layernorm", "bf16", (s.kv_lora_rank,)),
            # Absorbed when decoding: its halves multiply the query and the output, the same count of FLOPs.
            ("attention", "kv_b_proj", "fp8", (heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)),
            ("attention", "o_proj", "fp8", (d, heads * s.v_head_dim)),
            ("indexer", "indexer.wq_b", "fp8", (s.index_n_heads * s.index_head_dim, s.q_lora_rank)),
            ("indexer", "indexer.wk", "fp8", (s.index_head_dim, d)),
            ("indexer", "indexer.weights_proj", "bf16", (s.index_n_heads, d)),
        ):
            yield TensorGroup(part, f"layers.{i}.{name}.weight", format, shape)
        for name in ("weight", "bias"):
            yield TensorGroup("indexer", f"layers.{i}.indexer.k_norm.{name}", "f32", (s.index_head_dim,))
        dense = i < s.first_k_dense_replace
        width = s.intermediate_size if dense else s.moe_intermediate_size
        for name, shape in (("gate_proj", (width, d)), ("up_proj", (width, d)), ("down_proj", (d, width))):
            part = "dense_ffn" if dense else "shared_expert"
            yield TensorGroup(part, f"layers.{i}.{name}.weight", "fp8", shape)
            if not dense:
                name = f"layers.{i}.experts.*.{name}.weight"
                yield TensorGroup("routed_experts", name, "fp8", shape, s.n_routed_experts, s.num_experts_per_tok)
        if not dense:
            yield TensorGroup("router", f"layers.{i}.gate.weight", "bf16", (s.n_routed_experts, d))
            yield TensorGroup("router", f"layers.{i}.gate.bias", "f32", (s.n_routed_experts,))
    yield TensorGroup("norms", "norm.weight", "bf16", (d,))
    yield TensorGroup("head", "head.weight", "bf16", (s.vocab_size, d))


def parameters_by_part(model: Model, *, draft: bool = False) -> dict[str, int]:
    """Count the learned parameters of each part of the backbone, and of the MTP block if `draft`."""
    parts: Counter[str] = Counter()
    for group in inventory(model, draft=draft):
        parts[group.part] += group.parameters
    return dict(parts)


def active_parameters(model: Model) -> int:
    """Count the backbone parameters one token passes through, the embedding table not counted."""
    return sum(group.active_parameters for group in inventory(model))


def checkpoint_bytes(config: ModelConfig, *, draft: bool = True) -> dict[str, tuple[int, int]]:
    """Return safetensors dtype -> (tensors, data bytes) of the released format, UE8M0 scales counted as tensors.

    The sums equal the key count and `total_size` of the checkpoint's index. Source: released Flash index.
    """
    sums: dict[str, tuple[int, int]] = {}
    for group in inventory(config, draft=draft):
        for dtype, (count, size) in group.stored().items():
            tensors, total = sums.get(dtype, (0, 0))
            sums[dtype] = (tensors + count, total + size)
    return sums


def weights_bytes(config: ModelConfig, dtype: str = "released", *, draft: bool = True) -> int:
    """Return the bytes the weights take in memory, scales and the int64 hash tables included.

    `released` keeps every tensor as stored (packed FP4, FP8, BF16, F32); `float32` and `bfloat16` hold every
    parameter in 4 or 2 bytes, as a model of that dtype does. Raises ConfigError for another dtype.
    """
    groups = inventory(config, draft=draft)
    if dtype == "released":
        return sum(size for group in groups for _, size in group.stored().values())
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"weights dtype {dtype!r}: expected {', '.join(WEIGHT_DTYPES)}")
    size = 4 if dtype == "float32" else 2
    return sum(group.count * group.elements * (8 if group.format == "i64" else size) for group in groups)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How cache rows are encoded: V4's main rows and index keys, and V3.2's for the comparison."""

    main: str
    index: str
    v32_main: str
    v32_index: str
    meaning: str


LAYOUTS: Mapping[str, KVLayout] = {
    "released": KVLayout("fp8", "fp4", "fp8", "fp8", "FP8 rows with BF16 RoPE dims, FP4 index keys; V3.2 all FP8"),
    "no_scales": KVLayout("fp8_bare", "fp4_bare", "fp8_bare", "fp8_bare", "as released, scale bytes left out"),
    "fp8_index": KVLayout("fp8", "fp8", "fp8", "fp8", "as released, but index keys in FP8"),
    "bf16": KVLayout("bf16", "bf16", "bf16", "bf16", "everything BF16, V3.2 too"),
    "v32_bf16": KVLayout("fp8", "fp4", "bf16", "bf16", "as released against a BF16 V3.2 cache"),
    "float32": KVLayout("f32", "f32", "f32", "f32", "everything FP32: the reference number mode's carrier"),
}


def row_bytes(model: Model, layout: str = "released") -> tuple[int, int]:
    """Return bytes of one main row (window or compressed entry) and of one index key.

    Released V4 rows: nope (FP8) + 2 x rope (BF16) + 8 (a UE8M0 byte per 64, padded) and dim/2 + dim/32 (FP4 with a
    UE8M0 byte per 32): 584 and 68 for Flash and Pro. V3.2: latent + 2 x rope + an FP32 scale per 128, and dim + 4.
    """
    encodings, rope, dim = _choose(LAYOUTS, layout, "layout"), model.qk_rope_head_dim, model.index_head_dim
    is_v32 = isinstance(model, V32Spec)
    nope = model.kv_lora_rank if is_v32 else model.head_dim - rope
    scales = 4 * math.ceil(nope / 128) if is_v32 else 8 * max(1, math.ceil(nope / 512))
    bare = nope + 2 * rope
    whole = {"bf16": 2 * (nope + rope), "f32": 4 * (nope + rope)}
    main = {"fp8": bare + scales, "fp8_bare": bare} | whole
    index = {"fp4_bare": math.ceil(dim / 2), "fp8": dim + 4, "fp8_bare": dim, "bf16": 2 * dim, "f32": 4 * dim}
    index["fp4"] = index["fp4_bare"] + math.ceil(dim / 32)
    if is_v32:
        return main[encodings.v32_main], index[encodings.v32_index]
    return main[encodings.main], index[encodings.index]


def kv_bytes_per_token(model: Model, layout: str = "released") -> float:
    """Return the bytes a cache grows by per context token (exact; fractional where a ratio does not divide)."""
    main, index = row_bytes(model, layout)
    if isinstance(model, V32Spec):
        return model.num_hidden_layers * (main + index)
    return sum((main + (index if layer_kind(m) == "csa" else 0)) / m for m in model.layer_ratios if m)


def kv_bytes_by_kind(model: Model, context: int, layout: str = "released") -> dict[str, int]:
    """Return cache bytes at a context: CSA entries, their index keys, HCA entries, and every layer's window ring.

    Only whole compressed entries exist: floor(context / ratio) a layer. The window ring is constant. V3.2 has `mla`
    rows and `index_keys` only.
    """
    main, index = row_bytes(model, layout)
    if isinstance(model, V32Spec):
        rows = model.num_hidden_layers * context
        return {"mla": rows * main, "index_keys": rows * index}
    entries: Counter[str] = Counter()
    for ratio in model.layer_ratios:
        entries[layer_kind(ratio)] += context // ratio if ratio else 0
    return {
        "csa": entries["csa"] * main,
        "index_keys": entries["csa"] * index,
        "hca": entries["hca"] * main,
        "window": model.num_hidden_layers * model.sliding_window * main,
    }


def kv_bytes(model: Model, context: int, layout: str = "released") -> int:
    """Return the cache bytes of one sequence at a context, window rings included, compressor state not."""
    return sum(kv_bytes_by_kind(model, context, layout).values())


def kv_read_bytes(model: Model, context: int, layout: str = "released") -> int:
    """Return the least cache bytes one decoded token reads: attended rows plus every index key.

    CSA reads min(index_topk, entries) rows, HCA every entry, each layer its window. Source: sparse decode kernels.
    """
    main, index = row_bytes(model, layout)
    if isinstance(model, V32Spec):
        return model.num_hidden_layers * (min(context, model.index_topk) * main + context * index)
    keys = sum(context // m for m in model.layer_ratios if layer_kind(m) == "csa")
    return sum(_attended_rows(model, m, context) for m in model.layer_ratios) * main + keys * index


def _attended_rows(c: ModelConfig, ratio: int, context: int) -> int:
    entries = context // ratio if ratio else 0
    return min(c.sliding_window, context) + (min(entries, c.index_topk) if layer_kind(ratio) == "csa" else entries)


def state_bytes(
    config: ModelConfig, *, layout: str = "released", draft: bool = False, rewind: int = 0
) -> dict[str, int]:
    """Return the constant bytes of one sequence: window rings, and FP32 state of compressors and index compressors.

    A compressor keeps its projections and gate scores as two FP32 arrays (k x ratio, k x dim), k = 2 in CSA (the
    previous window overlaps) and 1 elsewhere. `draft` adds the MTP layer's window ring, `rewind` rows to every array.
    """
    main, _ = row_bytes(config, layout)
    rings = config.num_hidden_layers + (1 if draft and has_mtp(config) else 0)
    sizes = {"window": rings * (config.sliding_window + rewind) * main, "compressor": 0, "indexer": 0}
    for ratio in config.layer_ratios:
        k = 2 if layer_kind(ratio) == "csa" else 1
        slots = 2 * 4 * k * (k * ratio + rewind) if ratio else 0
        sizes["compressor"] += slots * config.head_dim
        sizes["indexer"] += slots * config.index_head_dim if k == 2 else 0
    return sizes


def page_tokens(config: ModelConfig) -> int:
    """Return the positions of one page: the least multiple of every ratio that is >= 128; 128 as released."""
    whole = math.lcm(*(m for m in config.layer_ratios if m))
    return whole * math.ceil(PAGE_TOKENS / whole)


def page_bytes(config: ModelConfig, *, tokens: int = PAGE_TOKENS, layout: str = "released") -> dict[str, int]:
    """Return the bytes of one page over all layers: compressed entries and index keys that `tokens` positions make.

    Raises ConfigError unless `tokens` is a multiple of every ratio, so that no page holds part of an entry.
    """
    for ratio in config.layer_ratios:
        if tokens < 1 or (ratio and tokens % ratio):
            raise ConfigError(f"page of {tokens} tokens: expected a positive multiple of every ratio, here {ratio}")
    return {kind: size for kind, size in kv_bytes_by_kind(config, tokens, layout).items() if kind != "window"}


def sequence_bytes(config: ModelConfig, context: int, *, layout: str = "released", draft: bool = False) -> int:
    """Return all cache memory of one sequence: its constant state plus whole pages for `context` positions."""
    tokens = page_tokens(config)
    page = sum(page_bytes(config, tokens=tokens, layout=layout).values())
    return sum(state_bytes(config, layout=layout, draft=draft).values()) + math.ceil(context / tokens) * page


def flops(model: Model, context: int) -> dict[str, int]:
    """Return FLOPs (2 x multiply-add) of decoding one token at a context of that many tokens, itself included.

    Counts every matrix the token multiplies (`attention` and `indexer` are their projections), attention over the
    keys it sees, the scoring of all index keys and the mixing of residual streams; leaves out element-wise work
    (norms, RoPE, softmax, activations, Sinkhorn).
    """
    moe = ("router", "routed_experts", "shared_expert", "dense_ffn")
    parts: Counter[str] = Counter()
    for group in inventory(model):
        if group.matmul_flops:
            parts["moe" if group.part in moe else group.part] += group.matmul_flops
    score = 2 * model.index_n_heads * model.index_head_dim
    if isinstance(model, V32Spec):
        mla = 2 * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)  # absorbed
        parts["core_attention"] = model.num_hidden_layers * mla * min(context, model.index_topk)
        parts["index_scoring"] = model.num_hidden_layers * score * context
        return dict(parts)
    for ratio in model.layer_ratios:
        row = 4 * model.num_attention_heads * model.head_dim
        parts["core_attention"] += row * _attended_rows(model, ratio, context)
        parts["index_scoring"] += score * (context // ratio) if layer_kind(ratio) == "csa" else 0
    n, d = model.hc_mult, model.hidden_size
    # A site collapses n streams, expands the result into n and mixes n x n; the head collapses once more.
    parts["hyper_connections"] += 2 * d * (2 * model.num_hidden_layers * (2 * n + n * n) + n)
    return dict(parts)


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What one call of a kernel takes at least: device memory read and written once each, and FLOPs."""

    moved: float
    flops: float


def site_kernel(c: ModelConfig, tokens: int) -> KernelCost:
    """Cost a hyper-connection site in one call: streams and y in, streams, normed vector and its FP8 copy out."""
    n, d = c.hc_mult, c.hidden_size
    rows = n * (n + 2)
    a_token = 2 * d * (2 * n + 1) + 2 * d + d + d // _FP8_BLOCK + 2 * 4 * (n + n * n)
    return KernelCost(4 * rows * n * d + 2 * d + tokens * a_token, tokens * 2 * d * (rows * n + 2 * n + n * n))


def experts_kernel(c: ModelConfig, tokens: int, distinct: int) -> KernelCost:
    """Cost a layer's routed experts, `distinct` of which are chosen: their weights, FP8 activations in, FP32 out."""
    d, elements = c.hidden_size, 3 * c.hidden_size * c.moe_intermediate_size
    weights = distinct * (elements // 2 + elements // _FP4_BLOCK)
    activations = tokens * (d + d // _FP8_BLOCK + 4 * d + 8 * c.num_experts_per_tok)
    return KernelCost(weights + activations, 2 * elements * c.num_experts_per_tok * tokens)


def product_kernel(outputs: int, depth: int, tokens: int, groups: int = 1) -> KernelCost:
    """Cost an FP8 product with weight (outputs, depth), BF16 out; with `groups` a token has as many times depth."""
    weights = outputs * depth + outputs * depth // _FP8_BLOCK**2
    activations = tokens * (groups * (depth + depth // _FP8_BLOCK) + 2 * outputs)
    return KernelCost(weights + activations, 2 * outputs * depth * tokens)


def weights_read(c: ModelConfig, sequences: int, element: float | None = None) -> float:
    """Return the bytes of weights a step over that many sequences reads: every matrix once, experts as expected.

    Each as released, or of `element` bytes a number. An expert that routes `active` of `count` is read with probability
    1 - (1 - active/count)^sequences.
    """
    read = 0.0
    for group in inventory(c):
        if group.format != "i64" and group.part != "embedding":
            stored = sum(size for _, size in group.stored().values())
            size = stored if element is None else element * group.count * group.elements
            read += size * (1 - (1 - group.active / group.count) ** sequences)
    return read


def decode_step(
    c: ModelConfig, context: int, batch: int, layout: str = "released", element: float | None = None
) -> KernelCost:
    """Cost one token of each of `batch` sequences: `weights_read`, and what each reads of its cache."""
    moved = weights_read(c, batch, element) + batch * kv_read_bytes(c, context, layout)
    return KernelCost(moved, batch * sum(flops(c, context).values()))


def attention_kernel(c: ModelConfig, ratio: int, context: int, tokens: int) -> KernelCost:
    """Cost decode attention: cache rows of a layer kind at a context, BF16 queries in, BF16 values out."""
    rows, heads, width = _attended_rows(c, ratio, context), c.num_attention_heads, c.head_dim
    return KernelCost(tokens * (rows * row_bytes(c)[0] + 4 * heads * width), tokens * rows * heads * width * 4)


def indexer_kernel(c: ModelConfig, context: int, tokens: int) -> KernelCost:
    """Cost index scores and picks: every FP4 key of each sequence once, BF16 queries in, int32 picks out."""
    keys, heads, width = context // 4, c.index_n_heads, c.index_head_dim
    moved = keys * row_bytes(c)[1] + heads * (2 * width + 4) + 4 * c.index_topk
    return KernelCost(tokens * moved, tokens * keys * heads * width * 2)


@dataclass(frozen=True, slots=True)
class Weighting:
    """What one FLOP counts as: core attention, V4's and V3.2's index scoring, BF16 compressors and head; else 1."""

    core: float
    index: float
    v32_index: float
    bf16: float
    meaning: str


WEIGHTINGS: Mapping[str, Weighting] = {
    "fp8_equivalent": Weighting(2, 0.5, 1, 1, "BF16 core attention x2, V4 index (FP4) x0.5, V3.2 index (FP8) x1"),
    "raw": Weighting(1, 1, 1, 1, "every FLOP counts 1"),
    "index_x1": Weighting(2, 1, 1, 1, "BF16 core attention x2, index x1 in both"),
    "core_x1": Weighting(1, 0.5, 1, 1, "core attention x1, V4 index (FP4) x0.5, V3.2 index (FP8) x1"),
    "bf16_x2": Weighting(2, 0.5, 1, 2, "as fp8_equivalent, with the BF16 compressors and head x2"),
}
DEFAULT_WEIGHTING = "fp8_equivalent"  # the one that reproduces both published ratios at 1M tokens


def part_weights(model: Model, weighting: str = DEFAULT_WEIGHTING) -> dict[str, float]:
    """Return FLOP part -> weight for the parts that do not count 1; raises ConfigError for an unknown weighting."""
    w = _choose(WEIGHTINGS, weighting, "weighting")
    index = w.v32_index if isinstance(model, V32Spec) else w.index
    bf16_parts = dict.fromkeys(("compressor", "index_compressor", "head"), w.bf16)
    return {"core_attention": w.core, "index_scoring": index} | bf16_parts


def weighted_flops(model: Model, context: int, weighting: str = DEFAULT_WEIGHTING) -> float:
    """Return the FP8-equivalent FLOPs of decoding one token at a context under a named weighting."""
    weights = part_weights(model, weighting)
    return sum(count * weights.get(part, 1) for part, count in flops(model, context).items())


@dataclass(frozen=True, slots=True)
class PriceRow:
    """USD per million tokens from a date on; the peak hours (UTC) cost `peak_factor` times as much."""

    model: str
    start: str  # ISO date and time, UTC
    hit: float
    miss: float
    output: float
    peak_factor: float
    note: str


_PEAK_DAILY = "off-peak; peak = 2x at 01-04 and 06-10 UTC daily"
PRICES: tuple[PriceRow, ...] = (
    PriceRow("flash", "2026-04-24T00:00", 0.028, 0.14, 0.28, 1, "launch list price, no peak hours"),
    PriceRow("flash", "2026-04-26T00:00", 0.0028, 0.14, 0.28, 1, "hits cut to a tenth, no peak hours"),
    PriceRow("flash", "2026-08-16T16:00", 0.007, 0.22, 0.66, 2, _PEAK_DAILY),
    PriceRow("flash", "2026-09-10T04:00", 0.003, 0.15, 0.60, 2, "off-peak; peak = 2x at 01-04 and 06-10 UTC Mon-Fri"),
    PriceRow("pro", "2026-04-24T00:00", 0.145, 1.74, 3.48, 1, "launch list price, no peak hours"),
    PriceRow("pro", "2026-04-26T00:00", 0.003625, 0.435, 0.87, 1, "75 % promotion (list is 4x), no peak hours"),
    PriceRow("pro", "2026-08-16T16:00", 0.022, 0.66, 1.98, 2, _PEAK_DAILY),
)


@dataclass(frozen=True, slots=True)
class TaskPrice:
    """A workload priced: `num_requests` times (`input_tokens`, of which `hit_tokens` from cache, `output_tokens`)."""

    input_tokens: int
    output_tokens: int
    hit_tokens: int
    num_requests: int
    row: PriceRow
    usd: float  # off-peak
    usd_peak: float


def price_row(model: str, prices: str = "current") -> PriceRow:
    """Return the price row of `flash` or `pro`: at `launch`, `current` (the newest), or in force on an ISO date."""
    rows = [row for row in PRICES if row.model == model]
    if not rows:
        known = ", ".join(dict.fromkeys(row.model for row in PRICES))
        raise ConfigError(f"no prices for model {model!r}; the table has {known}")
    moments = {"launch": rows[0].start, "current": rows[-1].start}
    try:
        moment = datetime.datetime.fromisoformat(moments.get(prices, prices))
    except ValueError:
        raise ConfigError(f"prices {prices!r}: expected launch, current or a date such as 2026-06-01") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    in_force = [row for row in rows if datetime.datetime.fromisoformat(row.start + "+00:00") <= moment]
    if not in_force:
        raise ConfigError(f"prices {prices!r}: the table of {model} starts on {rows[0].start[:10]}")
    return in_force[-1]


def price_task(
    input_tokens: int, output_tokens: int, hit: float, num_requests: int, *, model: str, prices: str = "current"
) -> TaskPrice:
    """Price `num_requests` equal requests; `hit` is a fraction of the input if <= 1, else a number of tokens.

    Raises ConfigError for negative counts, for more hits than input, and for a model or date without a price.
    """
    for name, value, least in (("IN", input_tokens, 0), ("OUT", output_tokens, 0), ("N", num_requests, 1)):
        if value < least:
            raise ConfigError(f"task {name}={value}: expected a whole number >= {least}")
    hit_tokens = round(hit * input_tokens) if hit <= 1 else hit
    if not 0 <= hit_tokens <= input_tokens or hit_tokens != int(hit_tokens):
        raise ConfigError(f"task HIT={hit:g}: expected a fraction 0..1 or a number of tokens <= IN={input_tokens}")
    row = price_row(model, prices)
    each = hit_tokens * row.hit + (input_tokens - hit_tokens) * row.miss + output_tokens * row.output
    usd = num_requests * each / 1e6
    return TaskPrice(input_tokens, output_tokens, int(hit_tokens), num_requests, row, usd, usd * row.peak_factor)


def _choose(table: Mapping[str, _Row], name: str, what: str) -> _Row:
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one model costs at one context; `to_dict` for programs, `table` for people."""

    name: str
    model: Model
    context: int
    weighting: str
    layout: str
    task: TaskPrice | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values; bytes, parameters and FLOPs are exact, `versus` holds ratios."""
        model, context, layout = self.model, self.context, self.layout
        by_part, kv = parameters_by_part(model), kv_bytes(model, context, layout)
        weighted, weighted_v32 = (weighted_flops(each, context, self.weighting) for each in (model, V32))
        main, index = row_bytes(model, layout)
        figures: dict[str, Any] = {
            "model": self.name,
            "context": context,
            "parameters": sum(by_part.values()),
            "parameters_by_part": by_part,
            "active_parameters": active_parameters(model),
            "active_parameters_with_embedding": active_parameters(model) + by_part["embedding"],
            "layout": {"name": layout, "meaning": LAYOUTS[layout].meaning, "row_bytes": main, "index_key_bytes": index},
            "kv_bytes_per_token": kv_bytes_per_token(model, layout),
            "kv_bytes": kv,
            "kv_bytes_by_kind": kv_bytes_by_kind(model, context, layout),
            "kv_read_bytes_per_token": kv_read_bytes(model, context, layout),
            "flops_per_token": sum(flops(model, context).values()),
            "flops_by_part": flops(model, context),
            "weighting": {"name": self.weighting, "meaning": WEIGHTINGS[self.weighting].meaning},
            "weighted_flops_per_token": weighted,
            "versus": {
                "v3.2": {"kv": kv / kv_bytes(V32, context, layout), "flops": weighted / weighted_v32},
                "gqa8": {"kv": kv / (GQA8_ROW_BYTES * model.num_hidden_layers * context)},
            },
        }
        if isinstance(model, ModelConfig):
            stored = checkpoint_bytes(model)
            tokens = page_tokens(model)
            figures |= {
                "parameters_with_mtp": sum(parameters_by_part(model, draft=True).values()),
                "layers": dict(Counter(layer_kind(ratio) for ratio in model.layer_ratios)),
                "state_bytes": state_bytes(model, layout=layout),
                "page_tokens": tokens,
                "page_bytes": page_bytes(model, tokens=tokens, layout=layout),
                "sequence_bytes": sequence_bytes(model, context, layout=layout),
                "checkpoint_tensors": sum(count for count, _ in stored.values()),
                "checkpoint_bytes": sum(size for _, size in stored.values()),
                "checkpoint_by_dtype": {k: {"tensors": n, "bytes": size} for k, (n, size) in stored.items()},
                "weights_bytes": {dtype: weights_bytes(model, dtype) for dtype in WEIGHT_DTYPES},
            }
        if self.task is not None:
            figures["task"] = dataclasses.asdict(self.task)
        return figures

    def table(self) -> str:
        """Return the figures as aligned lines of text for a terminal."""
        f, weights = self.to_dict(), part_weights(self.model, self.weighting)
        versus = f["versus"]
        row = "  {:<26}{:>21}  {}".format
        lines = [
            f"{self.name} at a context of {self.context:,} tokens",
            "",
            row("parameters", f"{f['parameters']:,}", "backbone"),
            *(row(f"  {k}", f"{n:,}", f"{n / f['parameters']:6.2%}") for k, n in f["parameters_by_part"].items()),
            row("activated per token", f"{f['active_parameters']:,}", "embedding table not counted"),
            row("", f"{f['active_parameters_with_embedding']:,}", "embedding table counted"),
            "",
            f"KV cache, layout {self.layout}: {f['layout']['meaning']}",
            row("row, index key", f"{f['layout']['row_bytes']} + {f['layout']['index_key_bytes']} B", ""),
            row("growth", f"{f['kv_bytes_per_token']:,.2f} B", f"{f['kv_bytes_per_token']:,.0f} B/token"),
            row("at this context", f"{f['kv_bytes']:,} B", f"{f['kv_bytes'] / 2**30:.3g} GiB"),
            *(row(f"  {kind}", f"{size:,} B", "") for kind, size in f["kv_bytes_by_kind"].items()),
            row("read per decoded token", f"{f['kv_read_bytes_per_token']:,} B", ""),
            "",
            f"FLOPs per decoded token, weighting {self.weighting}: {f['weighting']['meaning']}",
            *(row(f"  {k}", f"{n:,}", f"x{weights.get(k, 1):g}") for k, n in f["flops_by_part"].items()),
            row("sum", f"{f['flops_per_token']:,}", "raw"),
            row("", f"{f['weighted_flops_per_token']:,.0f}", "weighted"),
            "",
            "Compared at the same context",
            row("KV of V3.2's", f"{versus['v3.2']['kv']:.1%}", ""),
            row("KV of GQA-8's", f"{versus['gqa8']['kv']:.1%}", "8 heads of 128, bf16, same depth"),
            row("FLOPs of V3.2's", f"{versus['v3.2']['flops']:.1%}", f"weighting {self.weighting}"),
        ]
        if "layers" in f:
            kinds = ", ".join(f"{n} {kind}" for kind, n in f["layers"].items())
            lines += ["", f"Memory ({kinds} layers)"]
            lines.append(row("checkpoint", f"{f['checkpoint_bytes']:,} B", f"{f['checkpoint_tensors']:,} tensors"))
            lines.append(row("with MTP", f"{f['parameters_with_mtp']:,}", "parameters"))
            lines.append(row("state per sequence", f"{sum(f['state_bytes'].values()):,} B", "constant"))
            lines.append(row(f"page of {f['page_tokens']} tokens", f"{sum(f['page_bytes'].values()):,} B", ""))
        if self.task is not None:
            task, price = self.task, self.task.row
            lines += ["", f"Task at {price.model} prices from {price.start} UTC ({price.note})"]
            lines.append(row("hit / miss / output", f"{price.hit:g} / {price.miss:g} / {price.output:g}", "USD per 1M"))
            each = f"x ({task.input_tokens:,} in, {task.hit_tokens:,} of them cached, {task.output_tokens:,} out)"
            lines.append(row("requests", f"{task.num_requests:,}", each))
            lines.append(row("total", f"{task.usd:,.4f} USD", f"{task.usd_peak:,.4f} USD in peak hours"))
        return "\n".join(map(str.rstrip, lines))


def report(
    model: Model | str | Path,
    *,
    context: int,
    weighting: str = DEFAULT_WEIGHTING,
    layout: str = "released",
    task: tuple[int, int, float, int] | None = None,
    prices: str = "current",
) -> Report:
    """Cost one model at a context of that many tokens; `task` is (IN, OUT, HIT, N) as `price_task` takes them.

    `model` is a config, a preset name, `v3.2` or a directory with `config.json`. Raises ConfigError for anything
    unknown and for a context below 1.
    """
    name, resolved = resolve(model)
    if type(context) is not int or context < 1:
        raise ConfigError(f"context={context!r}: expected a whole number of tokens >= 1")
    _choose(WEIGHTINGS, weighting, "weighting")
    _choose(LAYOUTS, layout, "layout")
    priced = None if task is None else price_task(*task, model=name, prices=prices)
    return Report(name, resolved, context, weighting, layout, priced)
