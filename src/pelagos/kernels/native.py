"""The whole forward of a batch of spans on the CPU as one call of a C library: float32, reference mode, bit-exact.

Owns the build of the library, the packing of the weights and the checks of what is asked; the arithmetic is in
`native/*.c`. A token's outputs have the same bits whatever the batch, the chunks, the threads, and the places of its
pages and slot. Meaning: model/transformer.py. Source: technical report 2.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pelagos.config import ModelConfig, read_environment
from pelagos.errors import CapacityError, CheckpointError, ConfigError, MissingDependency, RequestError
from pelagos.kernels.layout import CacheLayout, LayerPlace, Output, Span

SOURCES = Path(__file__).with_name("native")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
TARGETS = ("-march=native", "-mcpu=native")  # the second where a compiler knows the first for x86 only
BLOCK_TOKENS = 256  # tokens that pass all layers together: what they leave behind stays in the second-level cache
_LANES, _PANEL, _STREAMS, _ALIGN = 16, 64, 4, 64
_MOST_LAYERS = 256  # a job of native/threads.c numbers 4096 stages, of which a layer takes up to 15
Array = np.ndarray
Parts = Sequence[Array]  # rows of one weight, to be laid one under another


@dataclass(frozen=True, slots=True)
class Build:
    """A built library: its file and the key of its bits, or no file and the reason."""

    path: Path | None
    key: str
    reason: str = ""


def build(cache_home: Path | None = None) -> Build:
    """Compile the library into `cache_home`/pelagos (default: the user's cache) unless it is there; never raises.

    The key names sources, flags, compiler and processor. Several processes may build at once: each renames its own
    finished file into place.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return Build(None, "", f"no C compiler: none of {', '.join(COMPILERS)} is on the PATH; install one")
    sources = sorted(SOURCES.glob("*.c"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[ch]"))]
    key = hashlib.blake2b("\0".join((*parts, *FLAGS, version, _processor())).encode(), digest_size=8).hexdigest()
    folder = (cache_home or read_environment().cache_home) / "pelagos"
    path = folder / f"native-{key}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if failure := _compile(compiler, sources, path):
                return Build(None, key, failure)
        check = ctypes.CDLL(str(path)).native_self_test()
    except OSError as error:
        return Build(None, key, f"{path}: {error}; delete it or make the folder writable")
    return (
        Build(None, key, f"{path}: self-test {check} failed with {version.splitlines()[0]}")
        if check
        else Build(path, key)
    )


def _compile(compiler: str, sources: Sequence[Path], path: Path) -> str:
    """Compile to a name of our own and rename; return why it failed, or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    failure = ""
    for target in TARGETS:
        command = [compiler, *FLAGS, target, "-o", name, *map(str, sources), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            os.replace(name, path)
            return ""
        failure = failure or f"{compiler} failed on the native forward: {done.stderr.strip()[-500:]}"
    os.unlink(name)
    return failure


def _processor() -> str:
    """What decides the instructions a compiler chooses for this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))


@functools.cache
def _descriptors() -> dict[str, Any]:
    """The structures of native/native.h by name: int64, double, a pointer or another structure each field."""
    text = re.sub(r"/\*.*?\*/", "", (SOURCES / "native.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    kinds: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
    for body, name in re.findall(r"typedef struct \{([^}]*)\} (Matrix|Pooled|Site|Layer|Model);", text):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+) ([^;]+);", body):
            for star, field, count in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
                each = ctypes.c_void_p if star else kinds.get(kind, ctypes.c_void_p)
                fields.append((field, each * int(count) if count else each))
        kinds[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return kinds


_FETCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_int32), ctypes.c_int64)


class Places(Protocol):
    """Experts in memory: numbers of places (E,) int64 a layer, filled with what a layer has chosen."""

    count: int

    def of(self, layer: int) -> Array: ...
    def fetch(self, layer: int, chosen: Array) -> None: ...
    def begin(self, tables: Mapping[int, Array], ids: Array) -> None: ...


class Store(Protocol):
    """Where experts are that are not in memory, and what makes places; `narrow`: their values are bfloat16 ones."""

    narrow: bool

    def open(self, each_bytes: int, put: Callable[[int, Array, Array, Array], None]) -> Places: ...


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.pool_new.argtypes, library.pool_new.restype = [ctypes.c_int], pointer
    library.pool_free.argtypes, library.pool_free.restype = [pointer], None
    library.native_scratch.argtypes, library.native_scratch.restype = [pointer, whole, ctypes.c_int], whole
    library.native_forward.restype = None
    library.native_forward.argtypes = [pointer, pointer, pointer, whole, pointer, pointer, whole, *[pointer] * 4]
    return library


def _panels(weight: Array, *, narrow: bool) -> Array:
    """Reorder (n, k) into panels [n / 64][k][64], then [k][32] for the rest; flat, n padded to a multiple of 32.

    `narrow` makes it bfloat16, outputs i and i + 16 of every 32 in one word: a shift and a mask widen them.
    """
    n, k = weight.shape
    padded = np.zeros((_padded(n), k), np.float32)
    padded[:n] = weight
    if narrow:
        padded = _to_bf16(padded)
        pairs = padded.reshape(-1, 2, _LANES, k)
        pairs[:] = pairs.transpose(0, 2, 1, 3).reshape(pairs.shape)
    whole = len(padded) // _PANEL * _PANEL
    panels = padded[:whole].reshape(-1, _PANEL, k).transpose(0, 2, 1).ravel()
    return np.concatenate((panels, padded[whole:].T.ravel()))


def _padded(outputs: int) -> int:
    return -(-outputs // 32) * 32


class _Weights:
    """Packed weights: planned first, then written into one arena, so that huge pages can hold what a step streams."""

    def __init__(self, tensors: Mapping[str, Array], config: ModelConfig, store: Store | None) -> None:
        self._tensors, self.config, self.store = tensors, config, store
        self._plan: list[tuple[Any, Sequence[Parts], int, int]] = []
        self._arena_bytes = _ALIGN
        self._kept: list[Array] = []
        self.bytes = 0

    def get(self, name: str, *shape: int, dtype: type = np.float32) -> Array:
        """Return a tensor, checked."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{name}: not among the tensors given, expected {dtype.__name__} {shape}")
        if tensor.shape != shape or tensor.dtype != dtype:
            raise CheckpointError(f"{name}: got {tensor.dtype} {tensor.shape}, expected {dtype.__name__} {shape}")
        return tensor

    def vector(self, name: str, *shape: int, dtype: type = np.float32) -> int:
        """Keep a copy of a small tensor; return its address."""
        return self.keep(self.get(name, *shape, dtype=dtype).copy())

    def keep(self, values: Array) -> int:
        """Keep an array; return its address."""
        self._kept.append(values)
        self.bytes += values.nbytes
        return values.ctypes.data

    def site(self, into: Any, prefix: str, outputs: int, scales: int, norm: str) -> None:
        """Describe a hyper-connection and the norm behind it."""
        dim = self.config.hidden_size
        self.matrix(into.fn, [self.get(f"{prefix}fn", outputs, _STREAMS * dim)], narrow=False)
        into.base, into.scale = self.vector(f"{prefix}base", outputs), self.vector(f"{prefix}scale", scales)
        into.norm = self.vector(norm, dim)

    def matrix(self, into: Any, *stacks: Parts, narrow: bool = True) -> None:
        """Plan stacked weights (n, k): as bfloat16 when every value is one and `narrow` allows it."""
        n, k = sum(len(part) for part in stacks[0]), stacks[0][0].shape[1]
        lossless = narrow and all(_is_bf16(part) for parts in stacks for part in parts)
        into.n, into.k, into.bf16 = n, k, int(lossless)
        each = _padded(n) * k * (2 if lossless else 4)
        self._plan.append((into, stacks, self._arena_bytes, each))
        self._arena_bytes += -(-len(stacks) * each // _ALIGN) * _ALIGN

    def pack(self) -> None:
        """Write what was planned and let go of the tensors."""
        arena = np.empty(self._arena_bytes, np.uint8)
        base = -arena.ctypes.data % _ALIGN
        for into, stacks, offset, each in self._plan:
            start = base + offset - _ALIGN
            into.data = arena.ctypes.data + start
            for i, parts in enumerate(stacks):
                values = _panels(np.concatenate(parts), narrow=bool(into.bf16))
                arena[start + i * each : start + (i + 1) * each] = values.view(np.uint8)
        self.keep(arena)
        self._plan, self._tensors = [], {}

    def stream(self, layers: Iterable[Any], store: Store) -> Places:
        """Let experts come from a store: make places, and have the layers look them up."""
        dim, hidden, size = self.config.hidden_size, self.config.moe_intermediate_size, 2 if store.narrow else 4
        sizes = _padded(2 * hidden) * dim * size, _padded(dim) * hidden * size

        def put(place: int, w1: Array, w2: Array, w3: Array) -> None:
            for room, weight in zip(rooms, (np.concatenate(_turns(w1, w3)), w2), strict=True):
                if store.narrow and not _is_bf16(weight):
                    raise CheckpointError("a streamed expert has values that bfloat16 does not hold")
                room[place] = _panels(weight, narrow=store.narrow).view(np.uint8)

        places = store.open(sum(sizes), put)
        rooms: list[Array] = []
        for each in sizes:
            room = np.empty(places.count * each + _ALIGN, np.uint8)
            self.keep(room)
            rooms.append(room[-room.ctypes.data % _ALIGN :][: places.count * each].reshape(-1, each))
        shapes = (2 * hidden, dim), (dim, hidden)
        for i, layer in enumerate(layers):
            for matrix, room, (n, k) in zip((layer.w13, layer.w2), rooms, shapes, strict=True):
                matrix.data, matrix.n, matrix.k, matrix.bf16 = room.ctypes.data, n, k, int(store.narrow)
            layer.place = places.of(i).ctypes.data
        return places


def _turns(w1: Array, w3: Array) -> list[Array]:
    """Rows of w1 and w3 (F, D) in turns of 16: a panel holds gates next to their ups."""
    return [w[i : i + _LANES] for i in range(0, len(w1), _LANES) for w in (w1, w3)]


def _to_bf16(values: Array) -> Array:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _is_bf16(weight: Array) -> bool:
    return not np.any(np.ascontiguousarray(weight).view(np.uint32) & 0xFFFF)


def _check_shape(config: ModelConfig) -> None:
    """Raise ConfigError for what the C code was not written for."""
    for name in ("hidden_size", "head_dim", "index_head_dim", "moe_intermediate_size"):
        if getattr(config, name) % _LANES:
            raise ConfigError(f"{name}={getattr(config, name)}: the native forward expects a multiple of {_LANES}")
    if config.num_hidden_layers > _MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers={config.num_hidden_layers}: the native forward serves {_MOST_LAYERS}")
    if config.hc_mult != _STREAMS:
        raise ConfigError(f"hc_mult={config.hc_mult}: the native forward expects {_STREAMS}")


class NativeForward:
    """The forward of spans over two pools of memory, by the C library.

    tensors: float32 arrays by official name, `tid2eid` int64; they are copied (packed) and not kept. pages (num_pages,
    page_bytes) and slots (num_slots, slot_bytes) uint8, contiguous, stay the caller's and must outlive this object.
    Routed experts come from `store` if there is one, with the same bits.
    Raises ConfigError for a layout or shape it does not serve, CheckpointError for a missing or wrong tensor,
    MissingDependency when the library cannot be built. One call at a time; a second waits.
    """

    two_kinds = False  # decode and prefill share their arithmetic
    draws = False

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: ModelConfig,
        layout: CacheLayout,
        pages: Array,
        slots: Array,
        *,
        threads: int,
        store: Store | None = None,
    ) -> None:
        _check_shape(config)
        if layout.mode != "reference" or threads < 1:
            raise ConfigError(f"layout mode={layout.mode!r}, threads={threads}: expected 'reference' and >= 1")
        for name, pool, width in (("pages", pages, layout.page_bytes), ("slots", slots, layout.slot_bytes)):
            flat = pool.ndim == 2 and pool.flags.c_contiguous and pool.flags.writeable
            if not flat or pool.dtype != np.uint8 or pool.shape[1] != width:
                raise ConfigError(
                    f"{name}: got {pool.dtype} {pool.shape}, expected contiguous writeable uint8 (count, {width})"
                )
        built = build()
        if built.path is None:
            raise MissingDependency(f"native forward: {built.reason}")
        self.numeric_path = f"cpu:native:{built.key}"
        self._library = _load(built.path)
        self._config, self._layout, self._pages, self._slots = config, layout, pages, slots
        self._weights = _Weights(tensors, config, store)
        self._tables = {i: tensors[f"layers.{i}.ffn.gate.tid2eid"] for i in range(config.num_hash_layers)}
        self._model, self._layers, self._places = _describe(self._weights, layout, pages, slots)
        self._callback, self._failed = _FETCH(self._fetch), None
        if self._places is not None:
            self._model.fetch = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._pointer = ctypes.addressof(self._model)
        self._pool = self._library.pool_new(threads)
        self._threads = threads
        self._close = weakref.finalize(self, self._library.pool_free, self._pool)
        self._lock = threading.Lock()
        self._scratch = np.empty(0, np.uint8)
        self._block = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._weights.bytes

    def scratch_bytes(self, tokens: int) -> int:
        """Bytes of scratch that calls of up to `tokens` tokens keep; it stops growing at BLOCK_TOKENS."""
        return int(self._library.native_scratch(self._pointer, _block(tokens), self._threads)) + _ALIGN

    def close(self) -> None:
        """End the threads; calls afterwards are a RequestError."""
        with self._lock:
            self._close()

    def forward(self, spans: Sequence[Span]) -> Output:
        """Run the backbone over spans; return their last tokens' logits and streams, rows in span order.

        Raises RequestError for tokens outside the vocabulary or a span that asks for more rows than it has,
        CapacityError for slots or pages that are not there.
        """
        return self._call(spans, None)

    def draft(self, spans: Sequence[Span], streams: Array) -> Output:
        """Run the draft block: span.tokens are the next ids, streams (tokens, 4, D) float32 those of each position.

        Raises as `forward`, and ConfigError for a model without a draft block.
        """
        if not self._config.num_nextn_predict_layers:
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers=0)")
        expected = (sum(len(span.tokens) for span in spans), _STREAMS, self._config.hidden_size)
        if streams.shape != expected or streams.dtype != np.float32:
            raise RequestError(f"draft streams: got {streams.dtype} {streams.shape}, expected float32 {expected}")
        return self._call(spans, np.ascontiguousarray(streams))

    def _call(self, spans: Sequence[Span], streams: Array | None) -> Output:
        config = self._config
        with self._lock:
            if not self._close.alive:
                raise RequestError("native forward: closed; make a new one")
            rows, tokens, pages = self._lay_out(spans, paged=streams is None)
            total, logits = len(tokens), sum(span.logits for span in spans)
            if total and _block(total) > self._block:
                self._block = _block(total)
                self._scratch = np.empty(self.scratch_bytes(self._block), np.uint8)
            out = np.empty((logits, config.vocab_size), np.float32)
            kept = sum(span.streams for span in spans)
            out_streams = np.empty((kept, _STREAMS, config.hidden_size), np.float32)
            if total:
                if self._places is not None and streams is None:
                    self._places.begin(self._tables, tokens)
                self._library.native_forward(
                    self._pointer, self._pool, rows.ctypes.data, len(spans), tokens.ctypes.data, pages.ctypes.data,
                    self._block, -(-self._scratch.ctypes.data // _ALIGN) * _ALIGN,
                    None if streams is None else streams.ctypes.data, out.ctypes.data, out_streams.ctypes.data,
                )  # fmt: skip
            if self._failed is not None:
                failed, self._failed = self._failed, None
                raise failed
        return Output(out, out_streams)

    def _fetch(self, layer: int, chosen: Any, count: int) -> int:
        """What the library calls between choosing experts and using them; an error ends the call, which raises it."""
        assert self._places is not None
        try:
            self._places.fetch(layer, np.ctypeslib.as_array(chosen, (count,)))
        except BaseException as error:
            self._failed = error
            return 1
        return 0

    def _lay_out(self, spans: Sequence[Span], *, paged: bool) -> tuple[Array, Array, Array]:
        """Check spans; return their rows as native/native.h has them, and the flat tokens and page ids."""
        layout, rows, seen = self._layout, np.empty((len(spans), 8), np.int64), set[int]()
        tokens, pages = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        total = page_total = 0
        for i, span in enumerate(spans):
            length = len(span.tokens)
            needed = layout.pages_for(span.start + length) if paged else 0  # the draft block has no entries
            if length == 0 or span.start < 0 or not 0 <= span.logits <= length or not 0 <= span.streams <= length:
                raise RequestError(
                    f"span {i}: {length} tokens from {span.start}, logits={span.logits}, streams={span.streams}: "
                    "expected at least one token, start >= 0 and no more rows than tokens"
                )
            if len(span.pages) < needed or not 0 <= span.slot < len(self._slots) or span.slot in seen:
                raise CapacityError(
                    f"span {i}: slot {span.slot} of {len(self._slots)} and {len(span.pages)} pages, expected a slot "
                    f"of its own and {needed} pages for positions up to {span.start + length}"
                )
            seen.add(span.slot)
            rows[i] = total, length, span.start, span.slot, page_total, span.frozen, span.logits, span.streams
            tokens.append(span.tokens)
            pages.append(span.pages[:needed])
            total, page_total = total + length, page_total + needed
        flat, table = np.concatenate(tokens, dtype=np.int64), np.concatenate(pages, dtype=np.int32)
        _check_range("token ids", flat, self._config.vocab_size, RequestError)
        _check_range("page ids", table, len(self._pages), CapacityError)
        return rows, flat, table


def _block(tokens: int) -> int:
    """Tokens of a block that scratch is made for: a power of two, so that it seldom grows."""
    return min(BLOCK_TOKENS, max(16, 1 << (tokens - 1).bit_length()))


def _check_range(name: str, values: Array, end: int, error: type[Exception]) -> None:
    if values.size and (values.min() < 0 or values.max() >= end):
        raise error(f"{name} {values.min()}..{values.max()}: expected 0 <= id < {end}")


def _describe(weights: _Weights, layout: CacheLayout, pages: Array, slots: Array) -> tuple[Any, Any, Places | None]:
    """Pack all weights and fill the library's descriptors; return model, layers, and the places of streamed experts."""
    from pelagos.kernels.ref.norm_rope import rope_frequencies

    kinds, config = _descriptors(), weights.config
    layers = (kinds["Layer"] * len(layout.layers))()
    model = kinds["Model"](
        dim=config.hidden_size, heads=config.num_attention_heads, width=config.head_dim, rope=config.qk_rope_head_dim,
        q_lora=config.q_lora_rank, groups=config.o_groups, o_lora=config.o_lora_rank, window=config.sliding_window,
        index_heads=config.index_n_heads, index_width=config.index_head_dim, topk=config.index_topk,
        experts=config.n_routed_experts, picks=config.num_experts_per_tok, hidden=config.moe_intermediate_size,
        vocab=config.vocab_size, iters=config.hc_sinkhorn_iters, layers=config.num_hidden_layers,
        drafts=config.num_nextn_predict_layers, page_tokens=layout.page_tokens, page_bytes=layout.page_bytes,
        slot_bytes=layout.slot_bytes, max_ratio=max(config.layer_ratios), scaling=config.routed_scaling_factor,
        limit=config.swiglu_limit, hc_eps=config.hc_eps, eps=config.rms_norm_eps, pages=pages.ctypes.data,
        slots=slots.ctypes.data, layer=ctypes.addressof(layers),
    )  # fmt: skip
    yarn, rope = {}, config.rope_scaling
    if rope is not None:
        yarn = {
            "factor": rope.factor, "original": rope.original_max_position_embeddings,
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow,
        }  # fmt: skip
    for kind, theta, scaling in ((0, config.rope_theta, {}), (1, config.compress_rope_theta, yarn)):
        model.freqs[kind] = weights.keep(rope_frequencies(config.qk_rope_head_dim, theta, **scaling).numpy())
    dim, vocab, drafts = config.hidden_size, config.vocab_size, config.num_nextn_predict_layers
    for i, (layer, place) in enumerate(zip(layers, layout.layers, strict=True)):
        draft = i - config.num_hidden_layers
        prefix = f"layers.{i}." if draft < 0 else f"mtp.{draft}."
        _describe_attention(layer, weights, place, prefix)
        _describe_experts(layer, weights, prefix, hashed=i < config.num_hash_layers and draft < 0)
    places = None if weights.store is None else weights.stream(layers, weights.store)
    embed = weights.get("embed.weight", vocab, dim)
    model.embed_bf16 = int(_is_bf16(embed))
    model.embed = weights.keep(_to_bf16(embed) if model.embed_bf16 else embed.copy())
    weights.matrix(model.head, [weights.get("head.weight", vocab, dim)])
    for into, prefix in zip(model.collapse, ("", "mtp.0.")[: 1 + drafts], strict=False):
        weights.site(into, f"{prefix}hc_head_", _STREAMS, 1, f"{prefix}norm.weight")
    if drafts:
        for name, norm in (("e_proj", "enorm"), ("h_proj", "hnorm")):
            weights.matrix(getattr(model, name), [weights.get(f"mtp.0.{name}.weight", dim, dim)])
            setattr(model, norm, weights.vector(f"mtp.0.{norm}.weight", dim))
    weights.pack()
    return model, layers, places


def _describe_attention(layer: Any, weights: _Weights, place: LayerPlace, prefix: str) -> None:
    config, attn = weights.config, f"{prefix}attn."
    dim, width, heads, latent = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    layer.ratio, layer.overlap = place.ratio, int(place.index is not None)
    layer.window, layer.window_rows = place.window.offset, place.window.rows
    first = [weights.get(f"{attn}wq_a.weight", latent, dim), weights.get(f"{attn}wkv.weight", width, dim)]
    second = [weights.get(f"{attn}wq_b.weight", heads * width, latent)]
    pools = ("compressor.", place.main, place.main_tail), ("indexer.compressor.", place.index, place.index_tail)
    for pool, (path, section, tail) in zip(layer.pool, pools, strict=True):
        if section is not None and tail is not None:
            span = section.width * (1 + tail.overlap)
            first += [weights.get(f"{attn}{path}{part}.weight", span, dim) for part in ("wkv", "wgate")]
            pool.width, pool.entries = section.width, section.offset
            pool.kv, pool.score, pool.rows = tail.kv.offset, tail.score.offset, tail.kv.rows
            pool.ape = weights.vector(f"{attn}{path}ape", tail.ratio, span)
            pool.norm = weights.vector(f"{attn}{path}norm.weight", section.width)
    if place.index is not None:
        inner = config.index_n_heads * config.index_head_dim
        first.append(weights.get(f"{attn}indexer.weights_proj.weight", config.index_n_heads, dim))
        second.append(weights.get(f"{attn}indexer.wq_b.weight", inner, latent))
    weights.matrix(layer.first, first)
    weights.matrix(layer.second, second)
    groups, rank = config.o_groups, config.o_lora_rank
    wo_a = weights.get(f"{attn}wo_a.weight", groups * rank, heads * width // groups)
    weights.matrix(layer.wo_a, *([part] for part in wo_a.reshape(groups, rank, -1)))
    weights.matrix(layer.wo_b, [weights.get(f"{attn}wo_b.weight", dim, groups * rank)])
    layer.q_norm = weights.vector(f"{attn}q_norm.weight", latent)
    layer.kv_norm = weights.vector(f"{attn}kv_norm.weight", width)
    layer.sink = weights.vector(f"{attn}attn_sink", heads)
    for site, name in zip(layer.site, ("attn", "ffn"), strict=True):
        weights.site(site, f"{prefix}hc_{name}_", (2 + _STREAMS) * _STREAMS, 3, f"{prefix}{name}_norm.weight")


def _describe_experts(layer: Any, weights: _Weights, prefix: str, *, hashed: bool) -> None:
    config, ffn = weights.config, f"{prefix}ffn."
    dim, hidden, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts

    def pair(path: str) -> list[Array]:
        return _turns(*(weights.get(f"{path}.{name}.weight", hidden, dim) for name in ("w1", "w3")))

    gate = weights.get(f"{ffn}gate.weight", experts, dim)
    pad = np.zeros((-experts % _LANES, dim), np.float32)
    weights.matrix(layer.gate, [gate, pad, *pair(f"{ffn}shared_experts")])
    if weights.store is None:
        weights.matrix(layer.w13, *(pair(f"{ffn}experts.{e}") for e in range(experts)))
        weights.matrix(layer.w2, *([weights.get(f"{ffn}experts.{e}.w2.weight", dim, hidden)] for e in range(experts)))
    weights.matrix(layer.shared_w2, [weights.get(f"{ffn}shared_experts.w2.weight", dim, hidden)])
    if hashed:
        table = weights.get(f"{ffn}gate.tid2eid", config.vocab_size, config.num_experts_per_tok, dtype=np.int64)
        if table.min() < 0 or table.max() >= experts:
            raise CheckpointError(f"{ffn}gate.tid2eid: {table.min()}..{table.max()}, expected 0 <= expert < {experts}")
        layer.tid2eid = weights.vector(f"{ffn}gate.tid2eid", *table.shape, dtype=np.int64)
    else:
        layer.bias = weights.vector(f"{ffn}gate.bias", experts)
