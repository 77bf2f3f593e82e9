"""The cost model against the published counts, the tables that recompute the claims, and the model itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos import cost
from pelagos.cli.cost import main, parse_task, parse_tokens
from pelagos.config import ModelConfig, flash, nano, pro, tiny
from pelagos.errors import ConfigError
from pelagos.model import Transformer

MILLION = 2**20
FLASH, PRO, V32 = flash(), pro(), cost.V32


def percents(*ratios: float) -> list[str]:
    return [f"{100 * ratio:.1f}" for ratio in ratios]


def near(text: str, value: float) -> bool:
    """Whether `value` rounds to `text`; next to a tie (52.649 for 52.7) either way will do."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits * 1.02


# Parameters and checkpoint


def test_parameters() -> None:
    def count(model: cost.Model, *, draft: bool = False) -> int:
        return sum(cost.parameters_by_part(model, draft=draft).values())

    assert (count(FLASH), count(PRO)) == (284_332_240_471, 1_572_997_201_763)
    assert f"{count(FLASH, draft=True) / 1e9:.3f} {count(PRO, draft=True) / 1e9:.3f}" == "290.942 1598.837"
    mtp = [cost.parameters_by_part(model, draft=True)["mtp"] for model in (FLASH, PRO)]
    assert [f"{n / 1e9:.3f}" for n in mtp] == ["6.610", "25.840"]
    # DeepSeek-V3's 671,026,419,200 and an indexer of 64 heads x 128 in each of 61 layers
    indexer = 61 * (64 * 128 * 1536 + 128 * 7168 + 64 * 7168 + 2 * 128)
    assert count(V32) == 671_026_419_200 + indexer


@pytest.mark.parametrize(
    ("model", "active", "with_embedding", "routed", "attention", "mhc"),
    [(FLASH, "13.270", "13.800", "277.025", "5.086", "33.8"), (PRO, "48.852", "49.779", "1547.396", "19.465", "84.0")],
    ids=["flash", "pro"],
)
def test_parameters_by_part(
    model: ModelConfig, active: str, with_embedding: str, routed: str, attention: str, mhc: str
) -> None:
    parts = cost.parameters_by_part(model)
    assert f"{cost.active_parameters(model) / 1e9:.3f}" == active
    figures = cost.report(model, context=1).to_dict()
    assert f"{figures['active_parameters_with_embedding'] / 1e9:.3f}" == with_embedding
    assert f"{parts['routed_experts'] / 1e9:.3f}" == routed
    mixing = sum(parts[part] for part in ("attention", "compressor", "indexer", "index_compressor"))
    assert f"{mixing / 1e9:.3f}" == attention
    sites = parts["hyper_connections"] - 16 * model.hidden_size - 5
    assert f"{sites / 1e6:.1f}" == mhc


def test_flash_checkpoint_equals_its_published_index() -> None:
    stored = cost.checkpoint_bytes(FLASH)
    assert sum(size for _, size in stored.values()) == 159_609_485_896
    assert {dtype: count for dtype, (count, _) in stored.items()} == {
        "BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792,
    }  # fmt: skip
    assert sum(count for count, _ in stored.values()) == 69_187
    assert cost.weights_bytes(FLASH) == 159_609_485_896


def test_weights_in_memory() -> None:
    assert [f"{cost.weights_bytes(model, draft=False) / 1e9:.1f}" for model in (FLASH, PRO)] == ["156.0", "850.7"]
    table = 8 * 3 * 129280 * 6
    assert cost.weights_bytes(FLASH, "bfloat16", draft=False) == 2 * 284_332_240_471 + table
    assert cost.weights_bytes(FLASH, "float32", draft=False) == 4 * 284_332_240_471 + table
    with pytest.raises(ConfigError, match="float16"):
        cost.weights_bytes(FLASH, "float16")


def test_fp8_experts_take_more_bytes_and_as_many_parameters() -> None:
    base = dataclasses.replace(FLASH, expert_dtype="fp8")
    assert cost.parameters_by_part(base) == cost.parameters_by_part(FLASH)
    experts = 44 * 256 * 3 * 4096 * 2048
    fp8, fp4 = experts + experts // 128**2, experts // 2 + experts // 32
    assert cost.weights_bytes(base) - cost.weights_bytes(FLASH) == fp8 - fp4
    assert "I8" not in cost.checkpoint_bytes(base)


@pytest.mark.parametrize("config", [tiny(), nano(), FLASH], ids=["tiny", "nano", "flash"])
def test_inventory_is_the_model(config: ModelConfig) -> None:
    live: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, tensor, stored in Transformer(config, device="meta").released_tensors():
        key = re.sub(r"experts\.\d+\.", "experts.*.", name)
        live[key] = (stored, tuple(tensor.shape), live.get(key, ("", (), 0))[2] + 1)
    planned = {g.name: (g.format, g.shape, g.count) for g in cost.inventory(config, draft=True)}
    assert planned == live


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predicted_weight_bytes_are_allocated(dtype: str) -> None:
    import torch

    for config in (tiny(), nano()):
        model = Transformer(config, dtype=getattr(torch, dtype))
        held = [tensor for _, tensor, _ in model.released_tensors()]
        assert cost.weights_bytes(config, dtype) == sum(t.numel() * t.element_size() for t in held)


def test_another_draft_is_not_counted_as_mtp() -> None:
    spark = dataclasses.replace(FLASH, compress_ratios=(*FLASH.compress_ratios, 0, 0), extra={"dspark_block_size": 5})
    assert cost.parameters_by_part(spark, draft=True) == cost.parameters_by_part(FLASH)
    assert cost.state_bytes(spark, draft=True) == cost.state_bytes(FLASH)


# KV cache and state


@pytest.mark.parametrize(
    ("layout", "v32", "of_v32", "of_gqa8"),
    [
        ("released", "46.94", ["10.5", "7.3"], ["2.02", "2.00"]),
        ("no_scales", "45.75", ["10.6", "7.4"], ["1.98", "1.96"]),
        ("fp8_index", "46.94", ["11.5", "8.0"], ["2.21", "2.19"]),
        ("bf16", "83.88", ["11.5", "8.0"], ["3.94", "3.91"]),
        ("v32_bf16", "83.88", ["5.9", "4.1"], ["2.0", "2.0"]),
    ],
)
def test_kv_table_at_one_million(layout: str, v32: str, of_v32: list[str], of_gqa8: list[str]) -> None:
    assert f"{cost.kv_bytes(V32, MILLION, layout) / 2**30:.2f}" == v32
    for model, against_v32, against_gqa8 in zip((PRO, FLASH), of_v32, of_gqa8, strict=True):
        versus = cost.report(model, context=MILLION, layout=layout).to_dict()["versus"]
        assert near(against_v32, 100 * versus["v3.2"]["kv"])
        assert near(against_gqa8, 100 * versus["gqa8"]["kv"])


def test_kv_bytes() -> None:
    assert [round(cost.kv_bytes_per_token(model)) for model in (FLASH, PRO, V32)] == [3514, 5031, 48068]
    assert cost.kv_bytes_per_token(FLASH) == 21 * (584 + 68) / 4 + 20 * 584 / 128
    assert [f"{cost.kv_bytes(model, MILLION) / 2**30:.2f}" for model in (FLASH, PRO)] == ["3.43", "4.92"]
    growth = [cost.kv_bytes_per_token(V32) / cost.kv_bytes_per_token(model) for model in (PRO, FLASH)]
    assert [f"{ratio:.2f}" for ratio in growth] == ["9.55", "13.68"]
    assert cost.row_bytes(FLASH) == (584, 68)
    assert cost.row_bytes(V32) == (656, 132)
    assert cost.row_bytes(nano(), "float32") == (4 * nano().head_dim, 4 * nano().index_head_dim)


def test_index_keys_dominate_reading_at_one_million() -> None:
    keys = cost.kv_bytes_by_kind(FLASH, MILLION, "fp8_index")["index_keys"]
    assert f"{keys / 1e6:.0f}" == "727"
    assert f"{keys / cost.kv_read_bytes(FLASH, MILLION, 'fp8_index'):.0%}" == "87%"


def test_constant_state() -> None:
    for model, megabytes in ((FLASH, "12.2"), (PRO, "18.7")):
        state = cost.state_bytes(model)
        assert state["window"] == model.num_hidden_layers * 74_752
        assert f"{(state['compressor'] + state['indexer']) / 1e6:.1f}" == megabytes
    assert cost.state_bytes(FLASH, draft=True)["window"] == 44 * 74_752


def test_pages_hold_the_growing_part() -> None:
    for config in (FLASH, PRO, nano(), tiny()):
        page = cost.page_bytes(config)
        assert sum(page.values()) == 128 * cost.kv_bytes_per_token(config)
        assert cost.page_tokens(config) == 128
        state = sum(cost.state_bytes(config).values())
        assert cost.sequence_bytes(config, 129) == state + 2 * sum(page.values())
    odd = dataclasses.replace(tiny(), compress_ratios=(0, 4, 24, 4, 24, 0, 0))
    assert cost.page_tokens(odd) == 144
    with pytest.raises(ConfigError, match=r"128 tokens.*24"):
        cost.page_bytes(odd)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 2, 3, 4, 8, 128]), min_size=6, max_size=8), st.integers(1, 5000))
def test_any_ratios(ratios: list[int], context: int) -> None:
    config = dataclasses.replace(tiny(), compress_ratios=tuple(ratios))
    figures = cost.report(config, context=context).to_dict()
    live = sum(t.numel() for n, t, _ in Transformer(config, device="meta").released_tensors() if "tid2eid" not in n)
    assert figures["parameters_with_mtp"] == live
    entries = [(context // m, m == 4) for m in config.layer_ratios if m]
    main, index = cost.row_bytes(config)
    growing = sum(n * (main + index * is_csa) for n, is_csa in entries)
    assert figures["kv_bytes"] == growing + 6 * 16 * main
    assert figures["kv_bytes"] <= context * figures["kv_bytes_per_token"] + 6 * 16 * main + 1e-6
    assert figures["kv_read_bytes_per_token"] <= figures["kv_bytes"] <= figures["sequence_bytes"]


# FLOPs


@pytest.mark.parametrize(
    ("weighting", "rows"),
    [
        ("raw", ["95 26", "54.9 17.7", "26.2 12.1"]),
        ("fp8_equivalent", ["80 21", "51.8 15.2", "26.5 10.0"]),
        ("index_x1", ["80 21", "54.7 17.2", "31.9 13.7"]),
        ("core_x1", ["95 25", "51.6 15.4", "20.6 8.2"]),
        ("bf16_x2", ["81 22", "52.7 15.7", "26.7 10.1"]),
    ],
)
def test_flops_table(weighting: str, rows: list[str]) -> None:
    for context, row in zip((4096, 2**17, MILLION), rows, strict=True):
        for model, text in zip((PRO, FLASH), row.split(), strict=True):
            versus = cost.report(model, context=context, weighting=weighting).to_dict()["versus"]
            assert near(text, 100 * versus["v3.2"]["flops"]), (context, text, versus)


@pytest.mark.parametrize(
    ("model", "dense", "core", "index", "moe", "rest"),
    [(V32, 24.5, 34.8, 1048.0, 48.6, 1.9), (PRO, 37.3, 76.7, 128.9, 56.7, 3.6), (FLASH, 9.6, 23.6, 90.2, 15.2, 1.8)],
    ids=["v3.2", "pro", "flash"],
)
def test_flops_by_part(model: cost.Model, dense: float, core: float, index: float, moe: float, rest: float) -> None:
    parts = {name: count / 1e9 for name, count in cost.flops(model, MILLION).items()}
    # The published split files the indexer's small per-head weights elsewhere: hence 0.1, not half a digit.
    assert parts["attention"] + parts["indexer"] == pytest.approx(dense, abs=0.1)
    assert parts["core_attention"] == pytest.approx(core, abs=0.05)
    assert parts["index_scoring"] == pytest.approx(index, abs=0.06)
    assert parts["moe"] == pytest.approx(moe, abs=0.06)
    others = sum(parts.get(name, 0) for name in ("compressor", "index_compressor", "hyper_connections", "head"))
    assert others == pytest.approx(rest, abs=0.05)


@pytest.mark.parametrize("config", [FLASH, PRO, nano()], ids=["flash", "pro", "nano"])
def test_flops_equal_the_formulas_term_by_term(config: ModelConfig) -> None:
    c, n = config, 3000
    d, wide, ql, groups = c.hidden_size, c.num_attention_heads * c.head_dim, c.q_lora_rank, c.o_groups * c.o_lora_rank
    csa, hca = c.layer_ratios.count(4), c.layer_ratios.count(128)
    parts = cost.flops(c, n)
    o_proj = wide // c.o_groups * groups + groups * d
    assert parts["attention"] == 2 * c.num_hidden_layers * (d * ql + ql * wide + d * c.head_dim + o_proj)
    keys = c.num_hidden_layers * c.sliding_window + csa * min(c.index_topk, n // 4) + hca * (n // 128)
    assert parts["core_attention"] == 4 * wide * keys
    assert parts["compressor"] == 4 * d * c.head_dim * (2 * csa + hca)
    index = c.index_n_heads * c.index_head_dim
    assert parts["indexer"] == csa * 2 * (ql * index + d * c.index_n_heads)
    assert parts["index_compressor"] == csa * 4 * d * 2 * c.index_head_dim
    assert parts["index_scoring"] == csa * 2 * index * (n // 4)
    experts = (c.num_experts_per_tok + 1) * 3 * d * c.moe_intermediate_size + d * c.n_routed_experts
    assert parts["moe"] == c.num_hidden_layers * 2 * experts
    assert parts["hyper_connections"] == c.num_hidden_layers * 2 * (192 * d + 48 * d) + 2 * (16 * d + 4 * d)
    assert parts["head"] == 2 * c.vocab_size * d


# Prices


def test_prices_of_a_task() -> None:
    launch = cost.price_task(1_000_000, 1_000_000, 0.25, 3, model="pro", prices="launch")
    assert launch.usd == launch.usd_peak == pytest.approx(3 * (0.25 * 0.145 + 0.75 * 1.74 + 3.48))
    now = cost.price_task(20_000, 1_500, 18_000, 50, model="flash")
    assert now.usd == pytest.approx(50 * (18_000 * 0.003 + 2_000 * 0.15 + 1_500 * 0.60) / 1e6)
    assert now.usd_peak == pytest.approx(2 * now.usd)
    assert (now.row.start, now.hit_tokens) == ("2026-09-10T04:00", 18_000)
    assert "off-peak" in now.row.note


@pytest.mark.parametrize(
    ("model", "date", "row"),
    [
        ("flash", "2026-04-24", (0.028, 0.14, 0.28)),
        ("flash", "2026-06-01", (0.0028, 0.14, 0.28)),
        ("flash", "2026-08-16T15:59", (0.0028, 0.14, 0.28)),
        ("flash", "2026-08-17T00:01+08:00", (0.007, 0.22, 0.66)),
        ("flash", "2026-09-10T04:00", (0.003, 0.15, 0.60)),
        ("pro", "2026-06-01", (0.003625, 0.435, 0.87)),
        ("pro", "current", (0.022, 0.66, 1.98)),
    ],
)
def test_price_table_is_dated(model: str, date: str, row: tuple[float, float, float]) -> None:
    found = cost.price_row(model, date)
    assert (found.hit, found.miss, found.output) == row


@pytest.mark.parametrize(
    ("task", "model", "prices", "message"),
    [
        ((10, 10, 11, 1), "flash", "current", "HIT=11"),
        ((10, 10, -0.5, 1), "flash", "current", "HIT=-0.5"),
        ((-1, 10, 0, 1), "flash", "current", "IN=-1"),
        ((10, 10, 0, 0), "flash", "current", "N=0"),
        ((10, 10, 0, 1), "nano", "current", "nano.*flash, pro"),
        ((10, 10, 0, 1), "flash", "tomorrow", "tomorrow.*launch, current"),
        ((10, 10, 0, 1), "flash", "2026-01-01", "starts on 2026-04-24"),
    ],
)
def test_impossible_tasks(task: tuple[int, int, float, int], model: str, prices: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cost.report(model, context=1, task=task, prices=prices)


# Report and command


def run(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(arguments)
    return shown.getvalue()


def test_command_prints_the_claims_as_json() -> None:
    found = {name: json.loads(run("--model", name, "--context", "1M", "--json")) for name in ("flash", "pro", "v3.2")}
    claims = (("flash", 284_332_240_471, "7.3", "10.0"), ("pro", 1_572_997_201_763, "10.5", "26.5"))
    for name, parameters, kv, flops in claims:
        figures = found[name]
        assert (figures["parameters"], figures["context"]) == (parameters, MILLION)
        versus = figures["versus"]
        assert percents(versus["v3.2"]["kv"], versus["v3.2"]["flops"], versus["gqa8"]["kv"]) == [kv, flops, "2.0"]
        assert sum(figures["parameters_by_part"].values()) == parameters
        assert sum(figures["flops_by_part"].values()) == figures["flops_per_token"]
        assert sum(figures["kv_bytes_by_kind"].values()) == figures["kv_bytes"]
    assert found["v3.2"]["versus"]["v3.2"] == {"kv": 1.0, "flops": 1.0}


def test_command_prints_a_table_for_people() -> None:
    text = run("--model", "flash", "--task", "20000,1500,90%,50", "--prices", "launch")
    for shown in ("284,332,240,471", "3,514 B/token", "7.3%", "10.0%", "2.0%", "2026-04-24", "in peak hours"):
        assert shown in text
    assert "x0.5" in text, "the weighting is stated beside the parts it weighs"
    assert "3.2" in run("--model", "v3.2", "--context", "128K", "--weighting", "raw", "--layout", "bf16")


def test_a_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(nano().to_dict()))
    here, preset = (json.loads(run("--model", name, "--context", "8K", "--json")) for name in (str(tmp_path), "nano"))
    assert here | {"model": "nano"} == preset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "flsh"], "flsh.*flash, pro"),
        (["--model", "."], "config.json"),
        (["--context", "0"], "context"),
        (["--context", "1.3"], "context='1.3'"),
        (["--context", "1T"], "context='1T'"),
        (["--weighting", "x"], "weighting 'x'.*raw"),
        (["--layout", "x"], "layout 'x'.*released"),
        (["--task", "1,2,3"], "got 3 fields"),
        (["--prices", "launch"], "prices launch: prices a task"),
        (["--task", "10,10,101%,1"], "at most 1"),
        (["--task", "10,10,0,1", "--dry-run", "4"], "--task with --dry-run"),
        (["--task", "ten,10,0,1"], "task IN='ten'"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_reading_token_counts_and_tasks() -> None:
    counts = [parse_tokens(text, "context") for text in ("4096", "128K", "1m", " 1_000 ", "1.5K")]
    assert counts == [4096, 131_072, MILLION, 1000, 1536]
    assert parse_task("1K, 10, .5, 2") == (1024, 10, 0.5, 2)
    assert parse_task("1000,10,512,2") == (1000, 10, 512, 2)
    assert parse_task("1000,10,12.5%,2") == (1000, 10, 0.125, 2)


@given(st.text(max_size=24))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_tokens(text, "context") >= 0
    with contextlib.suppress(ConfigError):
        assert all(number >= 0 for number in parse_task(text))


@pytest.mark.parametrize("context", [0, -1, True, 1e6, "1M"])
def test_context_is_a_count(context: int) -> None:
    with pytest.raises(ConfigError, match="context"):
        cost.report("tiny", context=context)
