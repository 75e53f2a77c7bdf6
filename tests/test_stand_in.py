"""What is offered without weights: no plan that tells heads apart, no loss without a band."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.words import figure
from kvtune.policies.export.contract import exporters, find_exporter
from kvtune.policies.option import Option
from kvtune.policies.pages import layout_of
from kvtune.policies.policy_file.reader import read_policy
from kvtune.simulator.quality.calibration import Calibration, Curve, Regime
from kvtune.simulator.quality.tables import Tables
from kvtune.simulator.quality.tables_file import save_tables
from kvtune.tests.made_up import llama
from kvtune.tests.tiers import first
from kvtune.tuner import source_models, stack_formats
from kvtune.tuner.band import FACTOR, FACTOR_BY_FAMILY, band, band_of_live, needed_factor
from kvtune.tuner.curves import loss_at, rows_at
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.limits import Limits
from kvtune.tuner.result import SearchResult
from kvtune.tuner.search import run_search
from kvtune.tuner.solver import evicts
from kvtune.tuner.stand_in_rules import GROUPS

pytestmark = pytest.mark.usefixtures("one_thread")


def plans(result: SearchResult) -> list[tuple[Any, ...]]:
    return [(p.sequences, p.prompt_bytes, p.parameters, p.chosen) for p in result.front]


# The plan


@pytest.mark.parametrize("name", first(("all heads", "heads within layers", "layers", "turned")))
def test_the_plan_is_the_same_whatever_the_order_of_the_sources_heads_and_layers(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = run_search(llama(tmp_path / "before"))
    about, rng = source_models.packaged_tables()[1], np.random.default_rng(1)
    within = rng.permuted(np.arange(packaged.heads).reshape(packaged.layers, -1), axis=1)
    order = {
        "heads within layers": within.ravel(),
        "layers": within[rng.permutation(packaged.layers)].ravel(),
        "turned": np.roll(np.arange(packaged.heads), packaged.kv_heads),
        "all heads": rng.permutation(packaged.heads),
    }[name]
    moved = replace(packaged, loss=packaged.loss[:, order], factor=packaged.factor[:, order])
    monkeypatch.setattr(source_models, "packaged_tables", lambda: (moved, about))
    again = run_search(llama(tmp_path / "again"))
    assert again.policy == before.policy
    assert plans(again) == plans(before)
    for ours, theirs in zip(again.front, before.front, strict=True):
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3, abs=1e-9)


def test_every_plan_of_the_front_has_one_option_for_all_heads(
    packaged: Tables, tmp_path: Path
) -> None:
    labels = {option.label for option in packaged.options}
    front = run_search(llama(tmp_path)).front
    assert len(front) > 3
    assert all(point.parameters["uniform"] in labels for point in front)


def test_no_other_option_for_all_heads_beats_the_plan_on_the_source(
    packaged: Tables, tmp_path: Path
) -> None:
    result = run_search(llama(tmp_path, sequences=12))
    shape, each = result.request.shape, result.budget.cache_bytes // 12
    generated = shape.kv_bytes(8192 + 256) - shape.kv_bytes(8192)
    rest = [n for n, sample in enumerate(packaged.samples) if sample.split != "evaluate"]
    check = packaged.subset(rest)
    losses = {}
    for number, option in enumerate(packaged.options):
        taken = 256 * option.footprint(option.budget.resolve(8192), 8192, shape.head_dim) + 4 * 256
        if taken + generated <= each:
            by_sample = check.by_sample(np.full(packaged.heads, number))
            losses[option.label] = float(check.sample_weights() @ by_sample)
    assert result.policy.heads[0][0].label == min(losses, key=losses.__getitem__)


# Rules that decide at run time


def with_kvzip(times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVzip with one budget over the model, which loses so many times what uniform rules do."""
    tables, about = source_models.packaged_tables()
    curve = [
        {**p, "name": "model_wide kvzip int4+4", "kl": times * p["kl"],
         "kl_interval": [times * end for end in p["kl_interval"]]}
        for p in about["baselines"]["uniform"]
    ]  # fmt: skip
    known = {**about, "baselines": {**about["baselines"], "kvzip": curve}}
    monkeypatch.setattr(source_models, "packaged_tables", lambda: (tables, known))


def test_a_newer_rule_that_loses_less_is_the_plan_and_fits(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on bytes holds however the allocator divides them, with the prompt that waits."""
    with_kvzip(1e-3, monkeypatch)
    result = run_search(llama(tmp_path, sequences=60))
    plan, *others = result.baselines
    assert (plan.family, plan.predicted.tier) == ("kvtune", "stand-in band")
    assert plan.name.startswith("kvzip+model_wide")
    assert all(plan.predicted.value < other.predicted.value for other in others)
    assert "kvzip" not in {other.family for other in others}, "which the plan is"
    document = read_policy((tmp_path / "policy.yaml").read_text())
    assert document.policy.allocator.name == "model_wide"
    assert result.policy.waits
    assert any("the plan reads the prompt a second time" in note for note in result.notes)
    shape, waiting = result.request.shape, result.request.shape.kv_bytes(8192) * 31 // 32
    budget = result.policy.budgets(8192)
    room = result.budget.limit_bytes - result.budget.weights.value - result.budget.overhead.value
    worst = most_pages(result.policy.heads[0][0], int(budget.sum()), budget.size, shape.head_dim)
    generated = shape.kv_bytes(8192 + 256) - shape.kv_bytes(8192)
    assert 60 * (worst + generated) + waiting <= room
    assert 60 * (worst + generated) + waiting > 0.85 * room, "for more than prefill works with"


def most_pages(option: Option, tokens: int, heads: int, head_dim: int) -> int:
    """Bytes of pages where as many heads as can be have one token in a page of their own."""
    layout = layout_of(option, head_dim)
    full, rest = divmod(tokens - heads, layout.page_tokens)
    assert rest >= 0
    return (heads + full) * layout.page_bytes


@pytest.mark.parametrize("sequences", [90, 110])
def test_a_rule_has_the_precision_of_the_bytes_that_it_fills(
    sequences: int, packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In short prompts much of the room are pages that are not full."""
    with_kvzip(1e-3, monkeypatch)
    curve = source_models.packaged_tables()[1]["baselines"]["kvzip"]
    for point in curve:
        point["name"] = f"model_wide kvzip {'int8' if point['at'] > 0.2 else 'int4+4'}"
    request = replace(llama(tmp_path, sequences=sequences), context_tokens=1024)
    result = run_search(request)
    option, share = result.policy.heads[0][0], result.share
    nearest = min(curve, key=lambda point: abs(np.log(point["at"] / share)))
    assert option.method.name == "kvzip"
    assert nearest["name"].endswith(option.keys.label)


def test_an_explorer_shows_a_rule_as_the_search_counted_it(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kvzip(1e-3, monkeypatch)
    result = run_search(llama(tmp_path, sequences=60))
    study = StudyReader(tmp_path).read()
    assert study.chosen is not None
    plan = study.plans[study.chosen]
    assert study.policy(plan).heads == result.policy.heads
    assert study.policy(plan).allocator == result.policy.allocator
    shown = figures_of(study, Setting.asked(study.facts))
    assert shown.prompt_bytes[study.chosen] == result.prompt_bytes
    assert shown.memory[study.chosen][0] == pytest.approx(result.memory.value, rel=1e-6)
    assert plan.kl.value == pytest.approx(result.quality.kl.value)


def test_a_newer_rule_that_takes_too_long_is_not_the_plan(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kvzip(1e-3, monkeypatch)
    soon = replace(llama(tmp_path, sequences=60), limits=Limits(first_token_s=1.5))
    plan, *_, kvzip = run_search(soon).baselines
    assert plan.name.startswith("uniform")
    assert (kvzip.family, kvzip.policy) == ("kvzip", "baselines/kvzip.yaml")
    assert kvzip.predicted.value < plan.predicted.value


def test_a_stack_is_given_no_rule_that_divides_budgets_at_run_time(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kvzip(1e-3, monkeypatch)
    assert run_search(llama(tmp_path, stack="vllm")).policy.allocator.name == "as_given"


def test_a_newer_rule_that_loses_more_is_left_out(
    packaged: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kvzip(1e3, monkeypatch)
    families = {each.family for each in run_search(llama(tmp_path, sequences=60)).baselines}
    assert "uniform" in families
    assert "kvzip" not in families


# The band


def test_a_band_holds_the_sources_own_value_and_what_its_tables_said() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        kinds = rng.choice(["prose", "code", "retrieval"], rng.integers(1, 30)).tolist()
        losses = rng.lognormal(rng.uniform(-9, 0), rng.uniform(0, 3), len(kinds))
        regimes: tuple[Regime, ...] = get_args(Regime)
        curves = {regime: Curve((1e-3, 1e-1), tuple(rng.normal(size=2))) for regime in regimes}
        some = bool(rng.integers(2))
        found = band(losses, kinds, Calibration(curves), evicts=some)
        mean = np.mean([losses[np.array(kinds) == kind].mean() for kind in set(kinds)])
        assert found.value == pytest.approx(Calibration(curves).mean(losses, kinds, some))
        assert found.low < found.value < found.high
        assert found.low < mean < found.high


def test_kinds_that_lose_more_and_less_widen_a_band() -> None:
    line, losses = Calibration(), [0.01, 0.01, 0.02, 0.02]
    kinds = ["prose", "prose", "code", "code"]
    alike = band(losses, ["prose"] * 4, line, evicts=True)
    apart = band([0.001, 0.001, 0.1, 0.1], kinds, line, evicts=True)
    assert apart.low < alike.low
    assert apart.high > alike.high


def test_a_loss_without_weights_is_printed_as_a_band_that_holds_the_sources_own_value(
    packaged: Tables, tmp_path: Path
) -> None:
    from kvtune.cli.search_report import tables
    from kvtune.common.estimate import BAND

    result = run_search(llama(tmp_path))
    assert {baseline.predicted.tier for baseline in result.baselines} == {BAND}
    for point in result.front:
        assert point.band is not None
        shown = figure(point.band, tier=False)
        if point.kl:
            low, high = map(float, shown.split(" to "))
            assert low <= point.kl <= high
    printed = figure(result.quality.kl)
    assert re.fullmatch(r"[\d.e-]+ to [\d.e-]+, stand-in band", printed)
    assert tables(result)


@pytest.mark.parametrize("stack", ["vllm", "llama-cpp", "openvino"])
def test_a_plan_inside_a_stack_keeps_its_loss_when_it_is_exported(
    stack: str, tmp_path: Path
) -> None:
    """Formats of the plan are the stack's own, and the same band stands in the exported file."""
    result = run_search(llama(tmp_path, stack=stack))
    assert result.front[-1].prompt_bytes < 0.4 * result.front[0].prompt_bytes
    document = read_policy(tmp_path / "policy.yaml")
    made = find_exporter(stack)().export(document, allow_stand_in=True)
    assert made.keeps_loss, made.report
    assert figure(result.quality.kl) in made.files["REPORT.txt"]


def test_what_a_stacks_formats_lose_was_measured_beside_the_same_four_bits() -> None:
    file = Path(__file__).parents[1] / "benchmarks/results/formats-stacks-cpu.json"
    live = json.loads(file.read_text("utf-8"))["live"]
    for label, ratios in stack_formats.OVER_INT4.items():
        for kind, ratio in ratios.items():
            told = (sum(live[name][kind]) for name in (label, stack_formats.BESIDE.keys.name))
            assert ratio == pytest.approx(next(told) / next(told), rel=0.01)
    owned = {form.label for kind in exporters().values() for form in kind.limits.own}
    assert owned == set(stack_formats.OVER_INT4)


def test_beyond_its_last_point_a_curve_stays_where_it_is() -> None:
    points = [
        {"at": 0.1, "share": 0.1, "kl": 0.3, "kl_interval": [0.2, 0.4]},
        {"at": 0.5, "share": 0.28, "kl": 0.01, "kl_interval": [0.005, 0.02]},
    ]
    assert loss_at(points, 0.28) == loss_at(points, 0.9)
    assert loss_at(points, 0.28).value == pytest.approx(0.01)
    assert 0.01 < loss_at(points, 0.2).value < 0.3


# Sources


@pytest.fixture
def other(packaged: Tables, make_tables: Callable[..., Tables]) -> Tables:
    """Another source: other heads, the same options, ten times the losses."""
    tables = make_tables(layers=2, kv_heads=1, count=9, seed=5)
    return replace(tables, model="other", loss=10 * tables.loss, factor=10**0.5 * tables.factor)


def written(tables: Tables, path: Path) -> Path:
    save_tables(tables, path, {})
    return path


def test_a_source_that_is_added_widens_the_bands(
    packaged: Tables, other: Tables, tmp_path: Path
) -> None:
    before = run_search(llama(tmp_path / "run"))
    source_models.add(written(other, tmp_path / "other.safetensors"))
    after = run_search(llama(tmp_path / "run"))  # not what the folder held: the sources changed
    assert after.quality.stand_in == "smollm2-135m, other"
    old = {p.parameters["uniform"]: p.band for p in before.front}
    both = [(old[p.parameters["uniform"]], p.band) for p in after.front
            if p.parameters["uniform"] in old and p.kl]  # fmt: skip
    assert both
    for narrow, wide in both:
        assert narrow is not None
        assert wide is not None
        assert wide.high > narrow.high


def test_a_source_is_kept_once_and_read_only_whole(
    packaged: Tables, other: Tables, tmp_path: Path
) -> None:
    file = written(other, tmp_path / "other.safetensors")
    _, kept = source_models.add(file)
    assert source_models.add(file)[1] == kept
    assert [tables.model for tables, _ in source_models.added()] == ["other"]
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.raises(KvtuneError, match="do not match their hash"):
        run_search(llama(tmp_path / "run"))


def test_what_is_no_source_is_refused(packaged: Tables, other: Tables, tmp_path: Path) -> None:
    file = written(other, tmp_path / "other.safetensors")
    with pytest.raises(KvtuneError, match="do not match their hash"):
        source_models.add(file, "0" * 64)
    with pytest.raises(KvtuneError, match="no such file"):
        source_models.add(tmp_path / "nowhere.safetensors")
    fewer = written(other.with_options(range(5)), tmp_path / "fewer.safetensors")
    with pytest.raises(KvtuneError, match="options are not those"):
        source_models.add(fewer)
    unsplit = written(other.of_split("search"), tmp_path / "unsplit.safetensors")
    with pytest.raises(KvtuneError, match="it has no 'evaluate' samples"):
        source_models.add(unsplit)
    named = written(replace(other, model="smollm2-135m"), tmp_path / "named.safetensors")
    with pytest.raises(KvtuneError, match="is there already"):
        source_models.add(named)
    assert source_models.added() == []


def test_a_trace_is_packed_into_a_small_file_that_says_the_same(
    packaged: Tables, tiny_model: Any, make_samples: Callable[..., list[Any]], tmp_path: Path
) -> None:
    from kvtune.common.progress import Silent
    from kvtune.simulator.quality.build import build_tables
    from kvtune.traces.capture import capture

    samples = make_samples(2, splits=("select", "evaluate"))
    trace = capture(tiny_model, samples, tmp_path / "t", probes=2, signals=("column_sums",))
    file = tmp_path / "tiny.safetensors"
    digest = source_models.pack(trace, "tiny", file, "cpu", Silent())
    tables, _ = source_models.add(file, digest)
    assert (tables.model, tables.heads) == ("tiny", 1)
    assert file.stat().st_size < 10_000
    whole = build_tables(trace, packaged.options)
    for option in range(len(packaged.options)):
        expected = whole.by_sample(np.full(whole.heads, option))
        found = tables.by_sample(np.full(1, option))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


# A model that was no source


def test_the_bands_hold_what_a_model_that_was_no_source_lost_live() -> None:
    """Gemma-3-270M, as ``benchmarks/stand_in.py`` measured it; the tables are the packaged ones."""
    measured = {
        "full all int4+4": 0.0040, "full all int4": 0.0062, "full all int4+4/int2+4": 0.0276,
        "h2o 50% int4+4": 0.5442, "h2o 50% int4+4/int2+4": 0.5462, "h2o 25% int4": 0.7997,
        "h2o 14.3% int4+4": 0.9091, "h2o 7.14% int4+4": 1.3382, "snapkv 25% int4+4": 0.4373,
        "snapkv 14.3% int4+4": 1.0809, "streaming_llm 50% int4+4": 0.0656,
        "streaming_llm 25% int4+4": 0.8331,
    }  # fmt: skip
    source, curves = source_models.packaged_tables()[0], source_models.packaged_calibration()
    held_out = source.of_split("evaluate")
    kinds = [sample.kind for sample in held_out.samples]
    inside = 0
    for number, option in enumerate(source.options):
        if (live := measured.pop(option.label, None)) is not None:
            losses = held_out.by_sample(np.full(source.heads, number))
            found = band(losses, kinds, curves, evicts=evicts(option))
            inside += found.low <= live <= found.high
    assert not measured
    assert inside == 12


RESULTS = Path(__file__).parents[1] / "benchmarks/results"
FAMILIES = RESULTS / "stand-in-families-gemma-3-270m-h200.json"


def test_bands_of_rules_that_ran_live_hold_what_the_same_rules_lost_on_that_model() -> None:
    """Gemma-3-270M, as ``benchmarks/stand_in_families.py`` measured it: bands were set on these.

    One cell is missed: the source's KVzip has eight bits at 35 % of a long prompt's bytes. In a
    short one its precision is four bits there, which keep all tokens and lose more.
    """
    curves = source_models.packaged_tables()[1]["baselines"]
    cells = [
        (float(share[:-1]) / 100, family, row["loss"])
        for share, best in json.loads(FAMILIES.read_text("utf-8"))["best"].items()
        for family, row in best.items()
        if family not in ("offered", "option")
    ]
    assert len(cells) == 48
    outside = [
        (share, family)
        for share, family, live in cells
        if needed_factor(loss_at(curves[family], share, family), live, family)
        > FACTOR_BY_FAMILY.get(family, FACTOR)
    ]
    assert outside == [(0.35, "kvzip")]


def test_a_band_reaches_as_many_times_below_its_source_as_above() -> None:
    """Models are exchangeable: which of two is the source is nobody's choice."""
    for family, times in (("uniform", FACTOR), ("kvzip", FACTOR_BY_FAMILY["kvzip"])):
        found = band_of_live(0.1, (0.1, 0.1), {}, family)
        assert found.high / 0.1 == pytest.approx(times)
        assert 0.1 / found.low == pytest.approx(times)
        assert needed_factor(found, 0.2, family) == pytest.approx(2)
        assert needed_factor(found, 0.05, family) == pytest.approx(2)


def test_factors_are_those_that_both_directions_between_two_models_ask_for() -> None:
    """As ``benchmarks/stand_in_factors.py`` derived them, and again from the rows themselves."""
    found = json.loads((RESULTS / "stand-in-factors.json").read_text("utf-8"))
    live = json.loads((RESULTS / "stand-in-gemma-3-270m.json").read_text("utf-8"))
    set_on = {"others": FACTOR, **FACTOR_BY_FAMILY}
    assert set(found["factors"]) == set(set_on)
    for name, asked in found["factors"].items():
        groups = [group["factor"] for group in found["groups"][name].values()]
        assert asked == pytest.approx(max(found["floor"], *groups))
        assert asked <= set_on[name] <= 1.02 * asked
    needed = [row["needed factor"] for row in live["rows"]]
    assert found["groups"]["others"]["options live, other length"] == {
        "cells": len(needed), "factor": max(needed), "most": max(needed)
    }  # fmt: skip


@pytest.mark.parametrize("least", ["offered inside", "rules inside", "options inside"])
def test_each_direction_is_held_by_factors_that_were_set_on_the_other_one(least: str) -> None:
    """Asked were 80 % of the plans offered; the cells are judged again here, row by row."""
    by = json.loads((RESULTS / "stand-in-factors.json").read_text("utf-8"))
    rows = json.loads((RESULTS / "stand-in-left-out.json").read_text("utf-8"))["directions"]
    name = least.split()[0]
    assert len(by["by the other direction"]) == 2
    for judged in by["by the other direction"]:
        factors = judged["factors of the other direction"]
        (cells,) = (each[name] for each in rows if each["left out"] == judged["left out"])
        others = factors["others"]
        held = [row["needed factor"] <= factors.get(row.get("family"), others) for row in cells]
        assert judged[least] == pytest.approx(np.mean(held))
        assert judged[least] >= 0.8


def test_what_is_offered_without_weights_is_within_a_tenth_of_the_best_uniform_rule() -> None:
    """On the same model: what a search chooses today, by what those policies lost there.

    At 35 % of a short prompt's bytes what is chosen did not run: KVzip would keep all tokens.
    """
    measured = json.loads(FAMILIES.read_text("utf-8"))
    tables, about = source_models.packaged_tables()
    rules = [family for group in GROUPS for family in group]
    missing = []
    for share, best in measured["best"].items():
        rows = rows_at(
            about["baselines"], float(share[:-1]) / 100, rules, 384 / tables.prompt_tokens
        )
        chosen = min(rows, key=lambda row: row.loss.value)
        if "offered" not in best:
            missing.append(share)
            continue
        assert chosen.name == best["offered"]["policy"]
        assert best["offered"]["loss"] <= 1.1 * best["uniform"]["loss"], share
    assert missing == ["35%"]
