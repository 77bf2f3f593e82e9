"""The native forward: equal to the torch forward, and the same bits whatever stands beside, before or under a token."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.model.drawn import TINY, TRUE, drawn, ids_of

from pelagos.config import ModelConfig, bundled_model_dir, read_environment, tiny
from pelagos.errors import CapacityError, CheckpointError, ConfigError, MissingDependency, RequestError
from pelagos.kernels import native
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.native import NativeForward, build
from pelagos.load import load_model
from pelagos.model import ContiguousCache, Transformer

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in native.COMPILERS), reason="no C compiler (cc, gcc or clang) on the PATH"
)
REWIND = 4
# No exact multiple anywhere: heads beside groups of four, outputs beside panels of sixteen, a draft limit that clamps.
ODD = dataclasses.replace(
    TINY, num_attention_heads=6, o_groups=2, index_n_heads=5, n_routed_experts=9, num_experts_per_tok=3, vocab_size=123,
    q_lora_rank=19, o_lora_rank=7, head_dim=48, qk_rope_head_dim=12, swiglu_limit=0.5, rope_scaling=None,
    compress_ratios=(6, 4, 6, 4, 4, 0, 0),
)  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "true": TRUE,
    "odd": ODD,
    "window": dataclasses.replace(TINY, compress_ratios=(0,) * 7, num_hash_layers=0),
}


@dataclasses.dataclass
class World:
    """A model, its native forward and pools with room for `slots` sequences of `positions`."""

    model: Transformer
    native: NativeForward
    layout: CacheLayout
    pages: np.ndarray
    slots: np.ndarray
    positions: int

    def table(self, sequence: int, order: int = 1) -> np.ndarray:
        count = self.layout.pages_for(self.positions)
        return np.arange(sequence * count, (sequence + 1) * count, dtype=np.int32)[::order]

    def all_logits(self, ids: np.ndarray, cuts: list[int], slot: int) -> np.ndarray:
        """Logits of every position, in chunks that end at `cuts`."""
        parts, start = [], 0
        for cut in [*cuts, len(ids)]:
            span = Span(ids[start:cut], start, slot, self.table(slot), logits=cut - start)
            parts.append(self.native.forward([span]).logits)
            start = cut
        return np.concatenate(parts)


def tensors_of(model: Transformer) -> dict[str, np.ndarray]:
    return {
        name: (t.detach().float() if t.is_floating_point() else t).numpy() for name, t, _ in model.released_tensors()
    }


def world(model: Transformer, positions: int, slots: int = 3, threads: int = 1) -> World:
    layout = CacheLayout(model.config, rewind=REWIND)
    generator = np.random.default_rng(0)
    count = layout.pages_for(positions) * slots
    pages = generator.standard_normal((count, layout.page_bytes // 4)).astype(np.float32).view(np.uint8)
    slot_rows = np.zeros((slots, layout.slot_bytes), np.uint8)
    forward = NativeForward(tensors_of(model), model.config, layout, pages, slot_rows, threads=threads)
    return World(model, forward, layout, pages, slot_rows, positions)


@pytest.fixture(scope="module", params=CONFIGS)
def small(request: pytest.FixtureRequest) -> World:
    return world(drawn(CONFIGS[request.param], 3), 400)


@pytest.fixture(scope="module")
def nano() -> World:
    if not bundled_model_dir("nano").is_dir():
        pytest.skip("models/nano is not in this checkout")
    return world(load_model("nano"), 700)


def ids_for(config: ModelConfig, length: int, seed: int = 0) -> np.ndarray:
    return ids_of(config, 1, length, seed)[0].numpy()


def test_equals_the_torch_forward(small: World) -> None:
    ids = ids_for(small.model.config, 400)
    with torch.no_grad():
        expected = small.model(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(small.all_logits(ids, [], 0), expected, atol=1e-4)


def test_nano_equals_the_torch_forward_beyond_topk_and_in_decode(nano: World) -> None:
    ids = ids_for(nano.model.config, 660)
    with torch.no_grad():
        expected = nano.model(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(nano.all_logits(ids, [256, 640, *range(641, 660)], 0), expected, atol=2e-4)


def test_chunks_do_not_change_a_bit(small: World) -> None:
    ids = ids_for(small.model.config, 400)
    whole = small.all_logits(ids, [], 0)
    for cuts in ([1, 2, 3, 10, 11, 139, 140, 300], list(range(5, 400, 5)), [399]):
        assert np.array_equal(small.all_logits(ids, cuts, 1), whole)


def test_nano_batch_threads_and_places_do_not_change_a_bit(nano: World) -> None:
    ids = ids_for(nano.model.config, 600)
    whole = nano.all_logits(ids, [128, 300], 0)
    pages = np.zeros_like(nano.pages)
    slots = np.zeros_like(nano.slots)
    two = NativeForward(tensors_of(nano.model), nano.model.config, nano.layout, pages, slots, threads=2)
    count = nano.layout.pages_for(700)
    table = np.arange(3 * count, dtype=np.int32)[::-1]
    other = ids_for(nano.model.config, 600, 1)
    rows = {0: [], 1: []}
    at = {0: 0, 1: 0}
    for lengths in ((580, 3), (1, 300), (4, 290), (15, 7)):
        spans = []
        for sequence, length in enumerate(lengths):
            start = at[sequence]
            text = (ids, other)[sequence][start : start + length]
            mine = table[sequence * count : (sequence + 1) * count]
            spans.append(Span(text, start, 2 - sequence, mine, logits=length))
            at[sequence] += length
        out = two.forward(spans).logits
        for sequence, part in enumerate(np.split(out, [lengths[0]])):
            rows[sequence].append(part)
    assert np.array_equal(np.concatenate(rows[0]), whole)
    assert np.array_equal(np.concatenate(rows[1]), nano.all_logits(other, [], 1))
    two.close()
    with pytest.raises(RequestError, match="closed"):
        two.forward([])


def test_a_step_taken_back_leaves_no_trace(small: World) -> None:
    ids, wrong = ids_for(small.model.config, 200), ids_for(small.model.config, REWIND, 7)
    whole = small.all_logits(ids, [], 0)
    parts, start = [], 0
    while start < 200:
        step = min(1 + start % 3, 200 - start)
        small.native.forward([Span(wrong, start, 1, small.table(1))])
        parts.append(
            small.native.forward([Span(ids[start : start + step], start, 1, small.table(1), logits=step)]).logits
        )
        start += step
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_lost_window_is_recomputed_over_frozen_entries(small: World) -> None:
    layout, ids = small.layout, ids_for(small.model.config, 400)
    whole = small.all_logits(ids, [], 0)
    frozen = 2 * layout.page_tokens
    start = max(0, frozen - layout.recompute_tokens)
    before = small.pages[small.table(0)[: frozen // layout.page_tokens]].copy()
    small.slots[2] = 0
    out = small.native.forward([Span(ids[start:], start, 2, small.table(0), frozen=frozen, logits=400 - start)]).logits
    assert np.isfinite(out).all()
    assert np.array_equal(out[frozen - start :], whole[frozen:])
    assert np.array_equal(small.pages[small.table(0)[: frozen // layout.page_tokens]], before)


def test_draft_equals_the_torch_draft_in_any_chunks(small: World) -> None:
    config, ids = small.model.config, ids_for(small.model.config, 301)
    text = torch.from_numpy(ids)[None]
    with torch.no_grad():
        cache = ContiguousCache(config)
        step = small.model.step(text[:, :-1])
        streams = small.model.run(step, cache)
        expected = small.model.logits(small.model.draft(streams, text[:, 1:], step, cache))[0].numpy()
    own = small.native.forward([Span(ids[:-1], 0, 0, small.table(0), logits=0, streams=300)])
    np.testing.assert_allclose(own.streams, streams[0].numpy(), atol=1e-4)
    assert own.logits.shape == (0, config.vocab_size)
    whole = small.native.draft([Span(ids[1:], 0, 0, small.table(0), logits=300, streams=300)], own.streams)
    np.testing.assert_allclose(whole.logits, expected, atol=2e-4)
    no_pages = np.empty(0, np.int32)
    parts = [
        small.native.draft([Span(ids[a + 1 : b + 1], a, 1, no_pages, logits=b - a, streams=1)], own.streams[a:b])
        for a, b in ((0, 1), (1, 40), (40, 41), (41, 300))
    ]
    assert np.array_equal(np.concatenate([p.logits for p in parts]), whole.logits)
    assert np.array_equal(parts[-1].streams[0], whole.streams[-1])


def test_only_the_rows_asked_for(small: World) -> None:
    ids = ids_for(small.model.config, 60)
    spans = [
        Span(ids[:n], 0, i, small.table(i), logits=k, streams=s) for i, (n, k, s) in enumerate([(60, 2, 0), (9, 0, 3)])
    ]
    out = small.native.forward(spans)
    assert out.logits.shape == (2, small.model.config.vocab_size)
    assert np.array_equal(out.logits, small.all_logits(ids, [], 2)[58:])
    assert out.streams.shape == (3, 4, small.model.config.hidden_size)
    assert small.native.forward([]).logits.shape == (0, small.model.config.vocab_size)


def test_bad_spans_are_refused(small: World) -> None:
    ids, table, call = ids_for(small.model.config, 140), small.table(0), small.native.forward
    for span, error, word in (
        (Span(ids[:0], 0, 0, table), RequestError, "at least one token"),
        (Span(ids, -1, 0, table), RequestError, "start >= 0"),
        (Span(ids, 0, 0, table, logits=141), RequestError, "no more rows"),
        (Span(ids, 0, 3, table), CapacityError, "slot 3 of 3"),
        (Span(ids, 0, 0, table[:1]), CapacityError, "2 pages"),
        (Span(ids, 0, 0, table + 1000), CapacityError, "page ids"),
        (Span(ids + 1000, 0, 0, table), RequestError, "token ids"),
    ):
        with pytest.raises(error, match=word):
            call([span])
    with pytest.raises(CapacityError, match="slot of its own"):
        call([Span(ids, 0, 1, table), Span(ids, 0, 1, table)])
    with pytest.raises(RequestError, match="draft streams"):
        small.native.draft([Span(ids, 0, 0, table)], np.zeros((1, 4, 64), np.float32))


def test_scratch_does_not_grow_with_the_call_and_weights_are_counted(nano: World) -> None:
    forward = nano.native
    assert forward.scratch_bytes(1) < forward.scratch_bytes(64) < forward.scratch_bytes(native.BLOCK_TOKENS)
    assert forward.scratch_bytes(8192) == forward.scratch_bytes(native.BLOCK_TOKENS)
    parameters = sum(t.numel() for _, t, _ in nano.model.released_tensors())
    assert 2 * parameters < forward.weight_bytes < 2.6 * parameters


def test_what_it_does_not_serve_is_an_error() -> None:
    model = drawn(TINY, 0)
    layout, tensors = CacheLayout(TINY), tensors_of(model)
    pages, slots = np.zeros((1, layout.page_bytes), np.uint8), np.zeros((1, layout.slot_bytes), np.uint8)
    with pytest.raises(ConfigError, match="head_dim=24"):
        NativeForward(tensors, dataclasses.replace(TINY, head_dim=24), layout, pages, slots, threads=1)
    with pytest.raises(ConfigError, match="'reference'"):
        NativeForward(tensors, TINY, CacheLayout(TINY, "released"), pages, slots, threads=1)
    with pytest.raises(ConfigError, match="hc_mult=2"):
        NativeForward(tensors, dataclasses.replace(TINY, hc_mult=2), layout, pages, slots, threads=1)
    with pytest.raises(ConfigError, match="pages"):
        NativeForward(tensors, TINY, layout, slots, slots, threads=1)
    with pytest.raises(CheckpointError, match=r"norm\.weight: not among"):
        NativeForward({k: v for k, v in tensors.items() if k != "norm.weight"}, TINY, layout, pages, slots, threads=1)


def test_build_in_an_empty_cache_and_again(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert built.path is not None
    assert sorted(tmp_path.rglob("*.so")) == [built.path]
    written = built.path.stat().st_mtime_ns
    assert build(tmp_path) == built
    assert built.path.stat().st_mtime_ns == written


def test_no_compiler_and_a_failing_one_give_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    broken = build(tmp_path)
    assert broken.path is None
    assert "this compiler is broken" in broken.reason
    failing.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_environment().cache_home == tmp_path
    absent = build()
    assert absent.path is None
    assert "no C compiler" in absent.reason
    layout = CacheLayout(tiny())
    pages, slots = np.zeros((1, layout.page_bytes), np.uint8), np.zeros((1, layout.slot_bytes), np.uint8)
    with pytest.raises(MissingDependency, match="no C compiler"):
        NativeForward({}, tiny(), layout, pages, slots, threads=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_and_the_exit_do_not_wait_for_threads_that_are_gone() -> None:
    source = (
        "import os, sys, numpy as np\n"
        "from tests.kernels.test_native import TINY, Span, drawn, ids_for, world\n"
        "w = world(drawn(TINY, 0), 128, threads=2)\n"
        "span = Span(ids_for(TINY, 20), 0, 0, w.table(0))\n"
        "parent = w.native.forward([span]).logits\n"
        "child = os.fork()\n"
        "same = np.array_equal(w.native.forward([span]).logits, parent)\n"
        "if not child: sys.exit(0 if same else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if same else 4)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root / "src"), str(root)))}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], env=environment, cwd=root, timeout=60)
    assert done.returncode == 0
