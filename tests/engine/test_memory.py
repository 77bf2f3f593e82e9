"""The memory plan: its bytes are the layout's, it fits what it is given, and says what does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.small import plan_of

from pelagos import cost
from pelagos.config import preset
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels.layout import CacheLayout

MODES = ("reference", "released")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny", "nano", "flash", "pro"])
@pytest.mark.parametrize("rewind", [0, 1, 8])
def test_bytes_are_those_of_the_layout(name: str, mode: str, rewind: int) -> None:
    config = preset(name)
    layout = CacheLayout(config, mode, rewind)
    plan = plan_of(config, mode=mode, rewind=rewind, max_requests=2, chunk_tokens=128)
    assert (plan.page_bytes, plan.slot_bytes) == (layout.page_bytes, layout.slot_bytes)
    assert plan.page_tokens == layout.page_tokens


@pytest.mark.parametrize(("name", "per_token"), [("flash", 3514.25), ("pro", 5031.4375)])
def test_a_page_is_the_released_bytes_per_token(name: str, per_token: float) -> None:
    plan = plan_of(preset(name), mode="released", max_requests=1)
    assert plan.page_bytes / plan.page_tokens == pytest.approx(cost.kv_bytes_per_token(preset(name)), abs=0)
    assert plan.page_bytes / plan.page_tokens == pytest.approx(per_token, abs=0.3)


@settings(max_examples=80, deadline=None)
@given(
    kv_bytes=st.integers(0, 200_000_000), max_requests=st.integers(1, 40), chunk=st.integers(1, 20_000),
    prefix_cache=st.booleans(), swap=st.booleans(), mode=st.sampled_from(MODES),
)  # fmt: skip
def test_a_plan_fits_and_wastes_less_than_a_page_or_says_what_is_missing(
    kv_bytes: int, max_requests: int, chunk: int, prefix_cache: bool, swap: bool, mode: str
) -> None:
    def plan(room: int):
        return plan_of(
            preset("nano"), mode=mode, kv_bytes=room, max_requests=max_requests, chunk_tokens=chunk,
            prefix_cache=prefix_cache, swap=swap,
        )  # fmt: skip

    try:
        planned = plan(kv_bytes)
    except CapacityError as error:
        least = int(str(error).split(" take ")[1].split(" bytes")[0].replace(",", ""))
        assert least > kv_bytes
        assert plan(least).refuse(chunk, 0) is None
        return
    assert kv_bytes - planned.page_bytes < planned.kv_bytes <= kv_bytes
    assert planned.slots == max_requests
    assert planned.positions >= chunk
    assert (planned.state_bytes > 0) <= prefix_cache
    assert planned.state_bytes <= (kv_bytes - planned.slots * planned.slot_bytes) / 4


def test_without_a_figure_every_request_gets_its_usual_context() -> None:
    nano, tiny = plan_of(preset("nano"), max_requests=3), plan_of(preset("tiny"), max_requests=3)
    assert nano.positions == 3 * 32_768
    assert tiny.positions == 3 * min(32_768, preset("tiny").max_position_embeddings)
    assert nano.state_bytes == pytest.approx(nano.pages * nano.page_bytes / 3, abs=1)
    assert plan_of(preset("nano"), max_requests=3, prefix_cache=False, swap=False).pages == nano.pages


def test_without_a_figure_a_plan_takes_half_of_what_is_left() -> None:
    plan = plan_of(preset("nano"), weight_bytes=90_000_000, scratch_bytes=10_000_000, available=300_000_000)
    assert 100_000_000 - plan.page_bytes < plan.kv_bytes <= 100_000_000
    assert plan.total_bytes == plan.kv_bytes + 100_000_000
    small = plan_of(preset("nano"), max_requests=1, chunk_tokens=1024, available=3_000_000)
    assert small.positions >= 1024, "more than half where half would not do"


def test_what_does_not_fit_is_refused_before_the_start() -> None:
    nano = preset("nano")
    with pytest.raises(CapacityError, match=r"kv_bytes=.*at most 50,000,000"):
        plan_of(nano, kv_bytes=60_000_000, weight_bytes=50_000_000, available=100_000_000)
    with pytest.raises(CapacityError, match="lower max_requests or chunk_tokens"):
        plan_of(nano, kv_bytes=1_000_000)
    with pytest.raises(CapacityError, match="there are 0 for the cache"):
        plan_of(nano, weight_bytes=50_000_000, available=40_000_000)


@pytest.mark.parametrize("wrong", [{"max_requests": 0}, {"chunk_tokens": 0}, {"kv_bytes": -1}, {"max_requests": True}])
def test_values_that_mean_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        plan_of(preset("nano"), **wrong)
    with pytest.raises(ConfigError, match="mode='float32'"):
        plan_of(preset("nano"), mode="float32")
    with pytest.raises(ConfigError, match="host_kv_bytes=1,000 with prefix_cache=False and preemption=recompute"):
        plan_of(preset("nano"), host_kv_bytes=1000, prefix_cache=False, swap=False)


def test_a_request_that_never_fits_is_told_by_how_much() -> None:
    plan = plan_of(preset("nano"), kv_bytes=30_000_000, max_requests=2)
    assert plan.refuse(plan.positions - 10, 10) is None
    message = plan.refuse(plan.positions - 10, 11)
    assert message is not None
    assert f"raise kv_bytes by {plan.page_bytes:,}" in message


def test_the_description_names_every_figure() -> None:
    plan = plan_of(preset("tiny"), kv_bytes=30_000_000, weight_bytes=5, scratch_bytes=7)
    figures = plan.describe()
    assert figures["total_bytes"] == plan.total_bytes == figures["kv_bytes"] + 12
    assert figures["pages"] == plan.pages
    assert all(type(value) is int for value in figures.values())
