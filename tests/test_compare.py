"""Strategies beside each other: equal bytes, fair clocks, continued where they stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.simulator.quality.calibration import NONE
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tuner.compare.additive import integer_program
from kvtune.tuner.compare.ledger import Ledger
from kvtune.tuner.compare.live_only import draw
from kvtune.tuner.compare.result import Comparison
from kvtune.tuner.compare.run import CompareRequest, Incumbent, comparison, run_strategy, thinned
from kvtune.tuner.compare.setting import Prepared, Setting
from kvtune.tuner.compare.strategies import STRATEGIES
from kvtune.tuner.compare.written import as_plain, write_comparison
from kvtune.tuner.options import SMALL
from kvtune.tuner.quality import ratio_interval
from kvtune.tuner.sources import QualitySource

pytestmark = pytest.mark.usefixtures("one_thread")
SHARE, SECONDS = 0.2, 40.0


class Clock:
    """Rises by a second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1.0
        return self.seconds


class Model:
    """Loses what the tables say, and counts how often it is asked."""

    def __init__(self, setting: Setting, split: str) -> None:
        self.tables = setting.tables.of_split(split)
        self.asked = 0

    def __call__(self, choices: Sequence[Any]) -> list[list[float]]:
        self.asked += len(choices)
        return [self.tables.by_sample(choice).tolist() for choice in choices]


@pytest.fixture
def setting(make_tables: Callable[..., Tables], tmp_path: Path) -> Setting:
    tables = make_tables(layers=4, kv_heads=2, count=12)
    request = llama(tmp_path, trials=8)
    return Setting(request, QualitySource(tables, NONE), SHARE, Prepared(5.0, 2.0))


def ledger(setting: Setting, name: str, clock: Clock | None = None) -> tuple[Ledger, Model]:
    model = Model(setting, "select")
    start = setting.prepared.seconds if STRATEGIES[name].reads_tables else 0.0
    setting.folder.mkdir(exist_ok=True)
    return Ledger(setting.folder / f"{name}.jsonl", model, start, clock or Clock()), model


def run(setting: Setting, name: str, seconds: float = SECONDS) -> tuple[list[Incumbent], Model]:
    book, model = ledger(setting, name)
    return run_strategy(STRATEGIES[name], setting, book, seconds, Silent()), model


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_plan_keeps_to_the_bytes_and_was_found_in_time(setting: Setting, name: str) -> None:
    found, _ = run(setting, name)
    assert found
    assert all(setting.share_of(each.choice) <= SHARE for each in found)
    assert all(each.seconds <= SECONDS for each in found)
    begins = setting.prepared.seconds if STRATEGIES[name].reads_tables else 0.0
    assert found[0].seconds > begins


def test_live_only_searches_become_better_and_nsga2_breeds(setting: Setting) -> None:
    """Parents without the mark of a generation would be overlooked, and children be draws."""
    last = {}
    for name in ("nsga2", "random"):
        found, model = run(setting, name, seconds=150.0)
        losses = [float(np.mean(model.tables.by_sample(each.choice))) for each in found]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]
        last[name] = losses[-1]
    assert last["nsga2"] < last["random"]


@pytest.mark.parametrize("name", ["nsga2", "random", "tuner"])
def test_an_interrupted_strategy_ends_as_an_uninterrupted_one(setting: Setting, name: str) -> None:
    whole, model = run(setting, name, seconds=30.0)
    path = setting.folder / f"{name}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:9])  # killed while writing
    again, second = run(setting, name, seconds=30.0)
    assert np.array_equal(again[-1].choice, whole[-1].choice) or name != "tuner"
    common = min(len(whole), len(again))
    for before, after in zip(whole[: common - 1], again[: common - 1], strict=True):
        assert np.array_equal(before.choice, after.choice)
    assert second.asked < model.asked


def test_a_ledger_of_another_comparison_is_refused(setting: Setting) -> None:
    run(setting, "random")
    other = replace(setting, request=replace(setting.request, seed=1))
    path = setting.folder / "random.jsonl"
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    changed[0]["choice"] = [int(o) for o in draw(other, np.random.default_rng(9))]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    book, _ = ledger(setting, "random")
    with pytest.raises(KvtuneError, match="another comparison"):
        list(itertools.islice(STRATEGIES["random"].search(setting, book), 2))


def test_time_on_file_is_counted_and_time_between_runs_is_not(tmp_path: Path) -> None:
    choice = np.zeros(2, np.int64)
    clock = Clock()
    first = Ledger(tmp_path / "runs.jsonl", lambda each: [[1.0]] * len(each), 10.0, clock)
    first.losses([choice])
    at = first.entries[-1].seconds
    clock.seconds += 1000.0
    second = Ledger(tmp_path / "runs.jsonl", lambda _: [], 10.0, clock)
    assert second.losses([choice]) == [(1.0,)]
    assert at <= second.seconds <= at + 5


def test_the_integer_program_is_exact_on_small_problems() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        loss = rng.exponential(1.0, (4, 5)).astype(np.float32)
        footprint = rng.integers(1, 20, 5)
        budget = int(4 * footprint.min() + 15)
        every = np.array(list(itertools.product(range(5), repeat=4)))
        fits = every[footprint[every].sum(1) <= budget]
        best = loss[np.arange(4), fits].sum(1).min()
        found = integer_program(loss, footprint, budget)
        assert footprint[found].sum() <= budget
        assert loss[np.arange(4), found].sum() == pytest.approx(best, rel=1e-5)


def test_the_integer_program_says_when_nothing_fits() -> None:
    with pytest.raises(KvtuneError, match="no option for each layer"):
        integer_program(np.ones((3, 2), np.float32), np.array([5, 9]), 14)


def test_draws_come_near_the_budget_and_vary(setting: Setting) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(setting, rng) for _ in range(40)]
    shares = [setting.share_of(each) for each in drawn]
    assert max(shares) <= SHARE
    assert np.mean(shares) > 0.5 * SHARE
    assert len({each.tobytes() for each in drawn}) > 30


def test_a_paired_ratio_holds_the_truth_and_knows_equal_from_unequal() -> None:
    rng = np.random.default_rng(1)
    kinds = ["a"] * 6 + ["b"] * 6
    inside = 0
    for _ in range(60):
        hard = rng.lognormal(0, 1.0, 12)
        noise = rng.normal(1, 0.1, (2, 12))
        value, low, high = ratio_interval(3 * hard * noise[0], hard * noise[1], kinds)
        inside += low <= 3 <= high
        assert low > 1
        assert low <= value <= high
    assert inside > 50
    assert ratio_interval(hard, hard, kinds) == (1.0, 1.0, 1.0)
    assert ratio_interval([2.0], [1.0], ["a"])[1:] == (0.0, float("inf"))


def test_a_curve_is_thinned_to_its_ends_and_a_few_between() -> None:
    found = [Incumbent(float(n), np.array([n])) for n in range(1, 101)]
    kept = thinned(found)
    assert (kept[0], kept[-1]) == (found[0], found[-1])
    assert len(kept) <= 6


@pytest.fixture(scope="module")
def compared(tiny_setting: Setting) -> Comparison:
    request = CompareRequest(tiny_setting.request, (SHARE,), 20.0)
    for part in comparison(request, tiny_setting.source, tiny_setting.prepared, Silent(), Clock()):
        write_comparison(part, request.search)
    return part


@pytest.fixture(scope="module")
def tiny_setting(
    tiny_model: Any,
    make_samples: Callable[..., list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setting:
    from kvtune.simulator.quality.build import build_tables
    from kvtune.traces.capture import capture

    folder = tmp_path_factory.mktemp("compare")
    samples = make_samples(6, splits=("search", "select", "evaluate"))
    trace = capture(tiny_model, samples, folder / "trace", probes=2, signals=("column_sums",))
    seen = [sample for sample in trace.samples if sample.split != "evaluate"]
    tables = build_tables(trace, SMALL.options()[::8], samples=seen)
    source = QualitySource(tables, NONE, loaded=tiny_model, trace=trace)
    request = llama(folder, trials=2, workload="small")
    return Setting(request, source, SHARE, Prepared(0.1, 0.1))


def test_all_strategies_run_live_on_the_same_held_out_samples(
    compared: Comparison, tiny_setting: Setting
) -> None:
    assert [o.strategy for o in compared.at(SHARE)] == list(STRATEGIES)
    for outcome in compared.outcomes:
        assert outcome.kl is not None
        assert outcome.share is not None
        assert outcome.share <= outcome.asked_share
        assert outcome.kl.tier == "live"
        assert outcome.times_the_tuner is not None
        assert (tiny_setting.request.run_dir / f"{100 * outcome.asked_share:g}%").is_dir()
    plain = json.loads((tiny_setting.request.run_dir / "compare.json").read_text())
    assert plain == json.loads(json.dumps(as_plain(compared)))
    assert len(list(compared.sentences())) == 1


def test_a_second_run_asks_the_model_nothing(
    compared: Comparison, tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvtune.tuner.validate as live

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(live, "validate_policies", refuse)
    request = CompareRequest(tiny_setting.request, (SHARE,), 20.0, ("tuner", "greedy"))
    parts = comparison(request, tiny_setting.source, tiny_setting.prepared, Silent(), Clock())
    again = list(parts)[-1]
    first = {o.strategy: o.kl for o in compared.at(SHARE)}
    assert {o.strategy: o.kl for o in again.at(SHARE)} == {n: first[n] for n in ("tuner", "greedy")}


def test_the_picture_has_a_line_for_every_strategy(compared: Comparison) -> None:
    from kvtune.tui.report.comparison import comparison_chart
    from kvtune.tui.report.drawing import rendered

    svg = rendered(comparison_chart(compared, SHARE), 6, 4, ("svg",))["svg"].decode()
    for strategy in STRATEGIES.values():
        assert strategy.words in svg
