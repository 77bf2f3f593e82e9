"""The local engine over a small real model: same bits whatever happens around a request, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.invariants import check_pool, check_prefix
from tests.engine.small import HELPER, VOCAB, engine_of, finish, params, prompt, tiny_model

from pelagos.config import tiny
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, build_engine, disk
from pelagos.engine.disk_file import CacheDirectory
from pelagos.engine.scheduler import Plan
from pelagos.engine.speculation import MTPDrafter
from pelagos.errors import CapacityError, ConfigError, ContextLengthError, RequestError
from pelagos.kernels import sampling
from pelagos.kernels.layout import Drawn, Output, Span

PATHS = [
    pytest.param(True, marks=pytest.mark.skipif(not HELPER, reason="no C compiler for the helper"), id="helper"),
    pytest.param(False, id="torch"),
]
PROMPTS = [prompt(length, seed) for seed, length in enumerate((300, 140, 385, 17))]


def run(engine: LocalEngine, prompts: list[list[int]], **changes: Any) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities of prompts served together."""
    streams = [engine.submit(each, params(logprobs=True, **changes)) for each in prompts]
    finish_all(engine, streams)
    return [[(step.token_id, step.logprob) for step in stream] for stream in streams]


def finish_all(engine: LocalEngine, streams: list[Any]) -> None:
    for _ in range(5000):
        if all(stream.finish_reason is not None for stream in streams):
            return
        with torch.inference_mode():
            engine.step()
    raise AssertionError("the requests did not end")


class Drawing:
    """A forward that picks tokens itself where spans say how."""

    draws = True

    def __init__(self, inner: Any) -> None:
        self._inner, self.picked, self.rows = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, spans: list[Span]) -> Output:
        return self._drawn(spans, self._inner.forward(spans))

    def draft(self, spans: list[Span], streams: np.ndarray) -> Output:
        return self._drawn(spans, self._inner.draft(spans, streams))

    def _drawn(self, spans: list[Span], out: Output) -> Output:
        picks, left, at = {}, [np.empty((0, out.logits.shape[1]), np.float32)], 0
        for index, span in enumerate(spans):
            rows, at = out.logits[at : at + span.logits], at + span.logits
            if span.draws:
                found = sampling.pick(torch.from_numpy(rows), torch.from_numpy(sampling.packed(span.draws)))
                picks[index] = [Drawn(int(token), logprob) for token, logprob in found.tolist()]
            else:
                left.append(rows)
        self.picked, self.rows = self.picked + len(picks), self.rows + len(left) - 1
        return Output(np.concatenate(left), out.streams, picks)


class TwoKinds:
    """A forward in which generated tokens leave other rows behind and have other logits than given ones."""

    two_kinds = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, spans: list[Span]) -> Any:
        return self._inner.forward([span._replace(tokens=(span.tokens + 7 * span.decode) % VOCAB) for span in spans])


def of_two_kinds(told: bool = True, **options: Any) -> LocalEngine:
    engine = engine_of(threaded=False, **options)
    engine._forward, engine._two_kinds = TwoKinds(engine._forward), told
    return engine


@pytest.fixture(scope="module")
def alone() -> dict[bool, list[list[tuple[int, float]]]]:
    """What each prompt gets by itself, cold, without speculation, on each path."""
    results = {}
    for native in (True, False) if HELPER else (False,):
        results[native] = []
        for each in PROMPTS:
            engine = engine_of(native=native, threaded=False, prefix_cache=False, speculation=False, chunk_tokens=1024)
            results[native] += run(engine, [each])
            engine.close()
    return results


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"speculation": False}, {"speculation": 3}, {"chunk_tokens": 50},
        {"preemption": "recompute", "kv_bytes": 420_000}, {"kv_bytes": 420_000},
    ],
    ids=["batch", "no drafts", "depth 3", "chunks", "recompute", "swap"],
)  # fmt: skip
def test_the_same_bits_alone_and_together(native: bool, options: dict[str, Any], alone: Any) -> None:
    engine = engine_of(**{"native": native, "threaded": False} | options)
    assert run(engine, PROMPTS) == alone[native]
    again = run(engine, PROMPTS[::-1])[::-1]  # now over what the prefix cache holds
    assert again == alone[native]
    stats = engine.stats()
    assert (stats.pages_in_use, stats.slots_in_use, stats.requests_running) == (0, 0, 0)
    assert (stats.preemptions > 0) == ("kv_bytes" in options)
    assert stats.hit_tokens > 0
    engine.close()


def test_sampling_with_drafts_is_sampling_without() -> None:
    results = []
    for speculation in (2, False):
        engine = engine_of(threaded=False, speculation=speculation)
        results.append(run(engine, PROMPTS, temperature=1.0, seed=3, top_p=0.9, max_tokens=40))
        engine.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("policy", ["full", "periodic(256)", "zero", "turns"])
def test_a_later_process_goes_on_from_disk(tmp_path: Path, policy: str, alone: Any) -> None:
    options = {"threaded": False, "disk_dir": tmp_path / "cache", "disk_policy": policy, "native": HELPER}
    first = engine_of(**options)
    run(first, PROMPTS)
    first.close()
    later = engine_of(**options)
    # The forward of a later turn: the first prompt and its answer, and then something new.
    longer = PROMPTS[0] + [token for token, _ in alone[HELPER][0]]
    streams = [later.submit(longer + prompt(9, 77), params()), later.submit(PROMPTS[2], params(logprobs=True))]
    while any(stream.finish_reason is None for stream in streams):
        with torch.inference_mode():
            later.step()
    steps = [(step.token_id, step.logprob) for step in streams[1]]
    assert steps == alone[HELPER][2]
    stats = later.stats()
    assert stats.disk["hits"] > 0
    assert stats.hit_tokens >= 256 + 256  # the complete pages of both
    if policy == "turns":
        assert streams[0].cached_tokens == len(longer) - 1  # the last token picked was never computed
    later.close()
    fresh = engine_of(threaded=False, native=HELPER)
    assert [token for token, _ in run(fresh, [longer + prompt(9, 77)])[0]] == [step.token_id for step in streams[0]]
    fresh.close()


def test_a_model_without_compressed_layers_has_empty_pages_and_the_same_bits() -> None:
    model = tiny_model(compress_ratios=(0,) * len(tiny().compress_ratios))
    results = []
    for options in ({"chunk_tokens": 1024, "prefix_cache": False}, {"chunk_tokens": 50, "speculation": 2}):
        engine = build_engine(model, None, EngineOptions(threaded=False, max_requests=4, **options))
        assert engine.plan.page_bytes == 0
        results += [run(engine, PROMPTS), run(engine, PROMPTS)]
        engine.close()
    assert all(result == results[0] for result in results)


def test_rows_of_logits_of_scored_prompts_are_bounded_and_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = engine_of(threaded=False, native=False, chunk_tokens=1024), []
    forward = engine._forward.forward
    monkeypatch.setattr(
        engine._forward, "forward", lambda spans: (rows.append(sum(s.logits for s in spans)), forward(spans))[1]
    )
    streams = [engine.submit(each, params(2, prompt_logprobs=True)) for each in PROMPTS[:3]]
    finish_all(engine, streams)
    assert 100 < max(rows) <= 128 + 4
    rows.clear()
    streams = [engine.submit(prompt(64, seed), params(1, prompt_logprobs=True)) for seed in range(40)]
    for _ in range(2):
        engine.step()
    assert rows == [128, 128]  # who waits for a slot takes none of them
    finish_all(engine, streams)
    planned = engine.plan.scratch_bytes - engine._forward.scratch_bytes(1024 + 4 * (1 + engine._layout.rewind))
    assert planned == (128 + 4) * VOCAB * 4
    engine.close()


def test_copies_that_wait_for_the_disk_are_planned_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_LOCK_S", 60)
    plain, engine = engine_of(threaded=False), engine_of(threaded=False, disk_dir=tmp_path / "cache")
    with CacheDirectory(tmp_path / "cache").locked(10) as held:  # a disk that does not come on
        assert held
        for seed in range(1000):
            finish(engine, engine.submit(prompt(1000, seed), params(1)))
            if (waits := engine.stats().disk)["dropped"]:
                break
        assert 1 << 20 < waits["queued_bytes"] <= engine.plan.scratch_bytes - plain.plan.scratch_bytes
    plain.close()
    engine.close()


def test_users_do_not_share_prefixes() -> None:
    engine = engine_of(threaded=False)
    for user, cached in (("a", 0), ("b", 0), ("a", 256)):
        stream = engine.submit(PROMPTS[0], params(2), user_id=user)
        finish(engine, stream)
        assert stream.cached_tokens == cached
    engine.close()


def test_a_fork_shares_the_past_and_goes_its_own_way(alone: Any) -> None:
    engine = engine_of(threaded=False, native=HELPER)
    parent = engine.submit(PROMPTS[0], params(16, logprobs=True))
    with torch.inference_mode():
        while engine.stats().generated_tokens < 6:
            engine.step()
    made = engine.stats().generated_tokens
    child = engine.fork(parent.request_id, params(6))
    other = engine.fork(parent.request_id, params(6, temperature=1.5, seed=1))
    finish_all(engine, [parent, child, other])
    steps = [step.token_id for step in parent]
    assert steps == [token for token, _ in alone[HELPER][0]]
    assert [step.token_id for step in child] == steps[made : made + 6]
    assert child.cached_tokens >= 256
    with pytest.raises(RequestError, match="not running"):
        engine.fork(parent.request_id, params())
    engine.close()


def test_cancel_abort_and_deadline_free_everything_at_once() -> None:
    now = [0.0]
    engine = engine_of(threaded=False)
    engine._clock = lambda: now[0]
    streams = [
        engine.submit(each, params(200), timeout_s=t) for each, t in zip(PROMPTS, (None, None, 5, None), strict=True)
    ]
    with torch.inference_mode():
        for _ in range(8):
            engine.step()
        assert engine.stats().slots_in_use == 4
        streams[0].cancel()
        engine.abort(streams[1].request_id)
        engine.abort("req-unknown")
        now[0] = 6.0
        engine.step()
    assert [stream.finish_reason for stream in streams] == ["cancelled", "cancelled", "deadline", None]
    assert engine.stats().slots_in_use == 1
    engine.close()
    assert streams[3].finish_reason == "cancelled"
    assert (engine.stats().slots_in_use, engine.stats().pages_in_use) == (0, 0)
    with pytest.raises(CapacityError, match="closed"):
        engine.submit(PROMPTS[0], params())


def test_what_can_never_fit_is_refused_and_bad_prompts_too() -> None:
    engine = engine_of(threaded=False, kv_bytes=420_000)
    limit = engine.config.max_position_embeddings
    with pytest.raises(CapacityError, match=r"raise kv_bytes"):
        engine.submit(prompt(9000, 0), params())
    with pytest.raises(ContextLengthError, match=f"maximum context length is {limit}"):
        engine.submit([5], params(limit))
    with pytest.raises(RequestError, match="empty"):
        engine.submit([], params())
    with pytest.raises(RequestError, match=f"={VOCAB}: expected a token id from 0 to {VOCAB - 1}"):
        engine.submit([1, VOCAB], params())
    engine.close()
    with pytest.raises(CapacityError, match="kv_bytes"):
        engine_of(kv_bytes=1000)
    with pytest.raises(ConfigError, match="preemption='maybe'"):
        engine_of(preemption="maybe")
    with pytest.raises(ConfigError, match="disk_policy='sometimes'"):
        engine_of(disk_policy="sometimes")


@pytest.mark.parametrize(
    "wrong",
    [
        {"speculation": None}, {"speculation": "yes"}, {"speculation": 1.5}, {"speculation": 5}, {"exact": "no"},
        {"native": 1}, {"prefix_cache": None}, {"disk_policy": 5}, {"chunk_tokens": 0}, {"max_requests": None},
        {"kv_bytes": 1e9}, {"disk_dir": 5}, {"threaded": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        engine_of(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"params": {"max_tokens": 3}},
        {"priority": None}, {"priority": 1.5}, {"user_id": 7}, {"timeout_s": float("nan")}, {"timeout_s": -1},
        {"timeout_s": "soon"}, {"cuts": (3.5,)}, {"cuts": ("3",)}, {"prompt": [1.0]}, {"prompt": ["5"]}, {"prompt": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_argument_is_refused_at_submit_by_its_name(wrong: dict[str, Any]) -> None:
    engine = engine_of(threaded=False)
    (name,) = wrong
    with pytest.raises(RequestError, match=name):
        engine.submit(wrong.pop("prompt", [5]), wrong.pop("params", params()), **wrong)
    assert len(finish(engine, engine.submit(np.array([5, 6]), params(2), cuts=(np.int64(1), 99)))[0]) == 2
    engine.close()


def test_a_caller_whose_on_step_raises_hears_of_it_and_nobody_else_does(alone: Any) -> None:
    engine = engine_of(native=HELPER)
    good = engine.submit(PROMPTS[0], params(logprobs=True))
    bad = engine.submit(PROMPTS[1], params(200), on_step=lambda: 1 / 0)
    assert [(step.token_id, step.logprob) for step in good] == alone[HELPER][0]
    with pytest.raises(ZeroDivisionError):
        list(bad)
    assert len(list(engine.submit(PROMPTS[2], params(5)))) == 5
    engine.close()
    assert bad.finish_reason == "cancelled"
    assert engine.stats().slots_in_use == 0


class Spelled:
    """A grammar of a few tokens from two, then the end token; whatever it is asked behind that is a fault."""

    def __init__(self, taken: int = 0, most: int = 6) -> None:
        self.taken, self.most = taken, most

    def mask(self) -> np.ndarray:
        if self.taken > self.most:
            raise IndexError("behind the end")
        mask = np.zeros(VOCAB, bool)
        mask[[5, 6] if self.taken < self.most else [1]] = True
        return mask

    def accept(self, token: int) -> None:
        self.taken += 1

    def rollback(self, count: int) -> None:
        self.taken -= count

    def fork(self) -> Spelled:
        return Spelled(self.taken, self.most)


def test_a_grammar_ends_with_drafts_as_without_and_its_faults_stay_with_their_request(alone: Any) -> None:
    results = []
    for speculation in (False, 4):
        engine = engine_of(native=HELPER, speculation=speculation)
        good = engine.submit(PROMPTS[0], params(logprobs=True))
        asked = SamplingParams(max_tokens=20, temperature=0, grammar=Spelled())
        results.append([step.token_id for step in engine.submit(PROMPTS[1], asked)])
        assert engine.config.eos_token_id == results[-1][-1] == 1
        with pytest.raises(IndexError, match="behind the end"):
            list(engine.submit(PROMPTS[1], SamplingParams(temperature=0, grammar=Spelled(most=3), ignore_eos=True)))
        assert [(step.token_id, step.logprob) for step in good] == alone[HELPER][0]
        engine.close()
    assert results[0] == results[1]
    assert len(results[0]) == 7


def test_an_abort_that_follows_its_submit_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(threaded=False)
    add, submitted = engine._scheduler.add, []

    def add_while_another_thread_submits_and_aborts(request: Any) -> None:
        add(request)
        if len(submitted) < 2:
            submitted.append(engine.submit([5, 6], params(50)))
            engine.abort(submitted[-1].request_id)

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "add", add_while_another_thread_submits_and_aborts)
        first = engine.submit([7, 8], params(3))
        finish(engine, first, *submitted)
    finish(engine, *submitted)
    assert [stream.finish_reason for stream in (first, *submitted)] == ["length", "cancelled", "cancelled"]
    engine.close()


def test_a_failing_forward_ends_its_requests_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    forward = engine._forward.forward
    with monkeypatch.context() as patch:
        patch.setattr(engine._forward, "forward", lambda spans: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(engine.submit(PROMPTS[0], params()))
    assert engine._forward.forward == forward
    assert len(list(engine.submit(PROMPTS[0], params(5)))) == 5
    assert engine.stats().slots_in_use == 0
    engine.close()


def test_prompt_logprobs_are_the_forwards_own() -> None:
    engine = engine_of(threaded=False)
    stream = engine.submit(PROMPTS[0], params(3, prompt_logprobs=True))
    finish(engine, stream)
    with torch.inference_mode():
        logits = tiny_model()(torch.tensor([PROMPTS[0]]))[0].double().log_softmax(-1)
    expected = [float(logits[at, token]) for at, token in enumerate(PROMPTS[0][1:])]
    found = stream.prompt_logprobs
    assert found is not None
    assert found[0] is None
    np.testing.assert_allclose(np.array(found[1:], float), expected, atol=1e-4)
    engine.close()


def test_many_threads_may_submit_at_once(alone: Any) -> None:
    engine = engine_of(native=HELPER)
    results: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        stream = engine.submit(PROMPTS[number % 4], params())
        results[number] = [step.token_id for step in stream]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [[token for token, _ in each] for each in alone[HELPER]]
    assert all(results[number] == expected[number % 4] for number in range(12))
    engine.close()


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_storm_of_submits_aborts_and_forks_leaves_nothing(preemption: str) -> None:
    choose = random.Random(9)
    engine = engine_of(threaded=False, kv_bytes=700_000, preemption=preemption)
    streams: list[Any] = []
    with torch.inference_mode():
        for _ in range(150):
            roll = choose.random()
            running = [stream for stream in streams if stream.finish_reason is None]
            if roll < 0.4 or not running:
                length = choose.randint(1, 400)
                options = {"priority": choose.randint(0, 1), "user_id": choose.choice("ab")}
                asked = params(choose.randint(1, 30))
                streams.append(engine.submit(prompt(length, choose.randint(0, 3)), asked, **options))
            elif roll < 0.55:
                choose.choice(running).cancel()
            elif roll < 0.7:
                name = choose.choice(running).request_id
                if name in engine._live:
                    streams.append(engine.fork(name, params(choose.randint(1, 20))))
            for _ in range(choose.randint(0, 3)):
                engine.step()
    finish_all(engine, streams)
    stats = engine.stats()
    assert (stats.pages_in_use, stats.slots_in_use, stats.requests_running, stats.requests_waiting) == (0, 0, 0, 0)
    assert stats.requests_done == len(streams)
    check_pool(engine._pool)
    check_prefix(engine._prefix)
    engine.close()


def test_swapped_out_right_after_rejected_drafts_opened_a_page() -> None:
    engine = engine_of(threaded=False, speculation=4)
    expected = finish(engine, engine.submit(prompt(120, 1), params(40)))
    stream = engine.submit(prompt(120, 1), params(40))
    swaps = 0
    with torch.inference_mode():
        while stream.finish_reason is None:
            engine.step()
            for request in engine._scheduler.running:
                if len(request.pages) > engine._layout.pages_for(request.computed + 1):
                    engine._scheduler._preempt(request, Plan())
                    swaps += 1
    assert swaps > 0
    assert finish(engine, stream) == expected
    engine.close()


def test_put_aside_on_the_way_through_a_lost_window() -> None:
    engine = engine_of(threaded=False, chunk_tokens=16, speculation=False)
    expected = finish(engine, engine.submit(prompt(400, 2), params(12)))
    for key in [*engine._prefix._anchors, *engine._prefix._between]:
        engine._prefix._drop(key)  # no state is left
    stream = engine.submit(prompt(400, 2), params(12))
    times = 0
    with torch.inference_mode():
        while stream.finish_reason is None:
            engine.step()
            for request in engine._scheduler.running:
                if request.computed < request.frozen and times < 3:
                    engine._scheduler._preempt(request, Plan())
                    times += 1
    assert times == 3
    assert engine.stats().hit_tokens >= 384
    assert finish(engine, stream) == expected
    engine.close()


def test_an_engine_that_is_never_closed_leaves_no_thread(tmp_path: Path) -> None:
    def serve() -> None:
        assert len(list(engine_of(disk_dir=tmp_path / "cache").submit(prompt(300, 1), params(3)))) == 3

    before = set(threading.enumerate())
    serve()
    deadline = time.monotonic() + 20
    while left := {each.name for each in threading.enumerate() if each not in before}:
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(0.05)
    with CacheDirectory(tmp_path / "cache").locked(0) as held:
        assert held


@pytest.mark.parametrize("then", ["", "os.fork() and os.wait()\n"], ids=["alone", "forked"])
def test_an_interpreter_may_end_under_a_running_engine(then: str) -> None:
    program = (
        "import os\n"
        "from tests.engine.small import engine_of, params, prompt\n"
        "engine = engine_of(native=False, host_kv_bytes=8 << 20)\n"
        "streams = [engine.submit(prompt(100, seed), params(900)) for seed in range(4)]\n"
        "assert streams[0].wait(60) is not None\n"
        f"{then}"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], capture_output=True, text=True, cwd=root,
        timeout=60, env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_fork_of_the_process_and_on_step_are_told_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(CapacityError, match="this is a fork"):
            engine.submit([5], params())
    with pytest.raises(ConfigError, match="on_step"):
        list(engine.submit([5], params(), on_step=engine.close))
    assert len(list(engine.submit([5], params(3)))) == 3
    engine.close()


def test_the_thread_ends_when_there_is_nothing_to_do_and_comes_back() -> None:
    engine = engine_of()
    assert len(list(engine.submit([5, 6, 7], params(3)))) == 3
    deadline = time.monotonic() + 60
    while engine._thread is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine._thread is None
    assert len(list(engine.submit([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True, seed=1)))) == 3
    engine.close()
    engine.close()


def test_where_the_library_cannot_be_exact_the_default_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pelagos.model import exactness

    monkeypatch.setattr(exactness, "broken_rule", lambda model, rows: "the head")
    engine = engine_of(native=False, threaded=False)
    assert engine.numeric_path.endswith("fast")
    assert "does not keep a row's bits in the head" in caplog.text
    engine.close()
    with pytest.raises(ConfigError, match=r"exact=True.*the head"):
        engine_of(native=False, exact=True)


@pytest.mark.parametrize("length", [127, 128, 255])
def test_a_page_of_the_first_generated_token_is_not_taken_from_another_prompt(length: int) -> None:
    plain = of_two_kinds(prefix_cache=False, speculation=False, chunk_tokens=1024)
    [expected] = run(plain, [prompt(length, 5)], max_tokens=60)
    plain.close()
    engine = of_two_kinds(preemption="recompute", speculation=False)
    stream = engine.submit(prompt(length, 5), params(60, logprobs=True))
    with torch.inference_mode():
        while engine.stats().generated_tokens < 20:
            engine.step()
        finish_all(engine, [engine.fork(stream.request_id, params(1))])  # a prompt with what is generated so far
        engine._scheduler._preempt(engine._scheduler.running[0], Plan())
    finish_all(engine, [stream])
    assert [(step.token_id, step.logprob) for step in stream] == expected
    engine.close()


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("length", [128, 129, 257])
def test_a_prompt_scored_to_its_last_token_alone_gets_the_same_answer_with_drafts(native: bool, length: int) -> None:
    answers = []
    for speculation in (False, 4):
        engine = engine_of(native=native, threaded=False, speculation=speculation)
        run(engine, [prompt(60, 1)], max_tokens=20)
        stream = engine.submit(prompt(length, 5), params(12, logprobs=True, prompt_logprobs=True))
        finish_all(engine, [stream])
        answers.append(([(step.token_id, step.logprob) for step in stream], stream.prompt_logprobs))
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("told", [True, False])
def test_where_decode_is_another_kind_nothing_generated_is_shared(told: bool) -> None:
    def serve(engine: LocalEngine, single: bool) -> list[Any]:
        answers: list[Any] = []
        prompts = PROMPTS
        for _ in range(2):  # the second turn's prompts hold what the first one generated
            if single:
                answers += (got := [run(engine, [each], max_tokens=130)[0] for each in prompts])
            else:
                answers += (got := run(engine, prompts, max_tokens=130))
            prompts = [[*each, *(token for token, _ in said), 3, 4] for each, said in zip(prompts, got, strict=True)]
        return answers

    expected = []
    plain = of_two_kinds(prefix_cache=False, speculation=False, chunk_tokens=1024)
    expected = serve(plain, single=True)
    plain.close()
    equal = True
    for options in ({}, {"kv_bytes": 500_000, "preemption": "recompute", "chunk_tokens": 256}):
        engine = of_two_kinds(told, **options)
        equal &= serve(engine, single=False) == expected
        equal &= serve(engine, single=True) == expected
        stats = engine.stats()
        assert stats.hit_tokens > 0
        assert (stats.preemptions > 0) == bool(options)
        engine.close()
    assert equal == told  # not told, the engine shares them, and a bit gives it away


@pytest.mark.parametrize("speculation", [False, 3])
def test_a_forward_that_picks_gives_the_same_tokens(speculation: int | bool) -> None:
    """Greedy, drawn, cut, and beside them requests that need whole rows, with drafts and without."""
    asked = [
        SamplingParams(max_tokens=24, ignore_eos=True, seed=5, **each)
        for each in (
            {"temperature": 0}, {"temperature": 1.0, "logprobs": True}, {"top_p": 0.8, "top_k": 30}, {"min_p": 0.05},
            {"presence_penalty": 0.5}, {"logprobs": 3}, {"prompt_logprobs": True},
        )
    ]  # fmt: skip
    results = []
    for drawing in (False, True):
        engine = engine_of(speculation=speculation, threaded=False)
        if drawing:
            engine._forward = forward = Drawing(engine._forward)
            if engine._drafter is not None:
                engine._drafter = MTPDrafter(forward.draft, window=16, max_depth=4, draws=True)
        streams = [engine.submit(prompt(30 + at, at), each) for at, each in enumerate(asked)]
        results.append((finish(engine, *streams), [stream.prompt_logprobs for stream in streams]))
        engine.close()
        if drawing:
            assert forward.picked > 60
            assert forward.rows > 40
    assert results[0] == results[1]
