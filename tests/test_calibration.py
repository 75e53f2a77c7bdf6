"""From predicted to live: curves that are found again, and intervals that hold what comes next."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.calibration import (
    NONE,
    AfterRounds,
    Calibration,
    Curve,
    Regime,
    conformal,
    fit_curve,
    fit_left_out,
    read_calibration,
    regime_of,
    write_calibration,
)
from kvtune.simulator.quality.levels import COMMON, KIND_TEXTS, Levels, Seen, levels_of
from kvtune.tests.tiers import first
from kvtune.tuner.quality import calibrated, estimate
from kvtune.tuner.source_models import packaged_calibration

KINDS = ["prose", "prose", "retrieval", "retrieval"]
CURVES = Calibration(
    {
        "evicting": Curve((1e-3, 1e-1), (0.1, 0.5), (-0.2, 0.2)),
        "evicting what is asked for": Curve((1e-3, 1e-1), (0.3, 0.9), (-0.4, 0.4)),
    }
)


def ratio(predicted: float) -> float:
    """Nearly right where little is lost, three times too low where much is."""
    return 1 + 2 * predicted / (predicted + 0.05)


def test_a_planted_curve_is_found_again() -> None:
    x = np.geomspace(1e-4, 0.3, 80)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, 80))
    found = fit_curve(x, x * [ratio(each) for each in x] * noise)
    for each in (3e-4, 5e-3, 0.03, 0.2):
        assert found.value(each) == pytest.approx(each * ratio(each), rel=0.12)


def test_a_few_outliers_do_not_move_the_curve() -> None:
    x = np.geomspace(1e-4, 0.1, 40)
    live = 1.5 * x
    live[[3, 17, 30]] *= 50
    assert fit_curve(x, live).value(0.01) == pytest.approx(0.015, rel=0.03)


def test_beyond_what_was_seen_the_ratio_stays_and_without_runs_so_does_the_prediction() -> None:
    found = fit_curve([0.01, 0.02], [0.02, 0.04])
    assert found.value(1.0) == pytest.approx(2.0, rel=0.01)
    assert found.value(1e-5) == pytest.approx(2e-5, rel=0.01)
    assert fit_curve([], []).value(0.02) == Curve().value(0.02) == 0.02
    assert NONE.value(0.02, "prose", True) == 0.02
    assert found.value(0.0) == 0


def test_of_what_one_group_shows_as_much_is_believed_as_is_asked() -> None:
    x = np.geomspace(1e-3, 0.1, 8)
    found = fit_left_out(x, 4 * x, [0] * 4 + [1] * 4, believed=0.5)
    assert found.value(0.01) == pytest.approx(0.02, rel=0.05)
    assert found.residuals == pytest.approx([np.log(2)] * 8, abs=0.05)  # what is left of it
    assert found.reach(0.8) == pytest.approx(np.log(2), abs=0.05)


@pytest.mark.parametrize("level", first([0.8, 0.95]))
def test_the_scatter_holds_left_out_texts_as_often_as_it_says(level: float) -> None:
    """Texts differ, and the plans of one text err together: by plans alone it would not hold."""
    rng, held = np.random.default_rng(1), []
    for _ in range(40):
        x = np.geomspace(1e-3, 0.1, 6)
        text = rng.normal(0, 0.2, 21)
        live = np.exp(text[:, None] + rng.normal(0, 0.05, (21, 6))) * x * 1.3
        seen, new = live[:20], live[20]
        names = np.repeat([f"text {n}" for n in range(20)], 6)
        found = fit_left_out(np.tile(x, 20), seen.ravel(), names.tolist())
        error = np.log(new / [found.value(each) for each in x])
        held += (abs(error) <= found.reach(level)).tolist()
    assert np.mean(held) == pytest.approx(level, abs=0.07)


def test_what_is_asked_for_has_a_curve_of_its_own_and_storing_everything_too() -> None:
    assert regime_of("prose", True) == "evicting"
    assert regime_of("retrieval", True) == "evicting what is asked for"
    assert regime_of("retrieval, some model", True) == "evicting what is asked for"
    assert regime_of("retrieval", False) == "quantising"
    assert CURVES.value(0.01, "retrieval", True) > CURVES.value(0.01, "code", True) > 0.01
    assert CURVES.value(0.01, "retrieval", False) == 0.01


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.booleans())
def test_samples_scaled_have_their_kinds_calibrated_means(
    losses: list[float], evicts: bool
) -> None:
    moved, means = CURVES.applied(losses, KINDS, evicts), CURVES.by_kind(losses, KINDS, evicts)
    assert moved[:2].mean() == pytest.approx(means["prose"])
    assert moved[2:].mean() == pytest.approx(means["retrieval"])
    assert CURVES.mean(losses, KINDS, evicts) == pytest.approx(np.mean(list(means.values())))


def levels(**apart: float) -> Levels:
    """That of two texts of each kind, half as much again as was printed."""
    return Levels(
        common=float(np.log(1.5)),
        apart=apart,
        spreads={"prose": 0.1, "code": 0.4, "retrieval": 0.2},
        spread=0.2,
        texts=dict.fromkeys(("prose", "code", "retrieval"), 2),
    )


def test_a_level_moves_what_evicts_on_every_kind_of_text_and_nothing_else() -> None:
    moved = CURVES.levelled(levels(), 2)
    for kind in ("prose", "code", "retrieval"):
        assert moved.value(0.01, kind, True) == pytest.approx(1.5 * CURVES.value(0.01, kind, True))
        assert moved.value(0.01, kind, False) == CURVES.value(0.01, kind, False)
    assert moved.runs == 2
    apart = CURVES.levelled(levels(code=float(np.log(3))), 2)
    assert apart.value(0.01, "code", True) == pytest.approx(4.5 * CURVES.value(0.01, "code", True))
    assert apart.value(0.01, "prose", True) == moved.value(0.01, "prose", True)
    assert NONE.levelled(levels(), 1).value(0.01, "prose", True) == pytest.approx(0.015)


def test_what_is_usual_of_a_stack_moves_all_of_its_policies_until_and_when_some_have_run() -> None:
    usual = Calibration(level=float(np.log(3)), levels_all=True)
    assert usual.value(0.01, "prose", False) == pytest.approx(0.03)
    assert usual.levelled(levels(), 1).value(0.01, "prose", False) == pytest.approx(0.045)


def test_after_live_rounds_the_interval_is_as_wide_as_texts_and_their_number_say() -> None:
    before = replace(CURVES, after_rounds=AfterRounds(0.2, tuple(np.linspace(0, 2, 199))))
    after = before.levelled(levels(), 2)

    def reach(kind: str, texts: int, level: float = 0.8) -> float:
        return after.reach({kind: 0.01}, {kind: texts}, True, level)

    shares = 1 / (2 + KIND_TEXTS) + 1 / 6 + COMMON
    assert reach("prose", 6) == pytest.approx(1.6 * 0.1 * np.sqrt(shares), rel=0.02)
    assert reach("code", 6) == pytest.approx(4 * reach("prose", 6))
    assert reach("prose", 1) > reach("prose", 6) > reach("prose", 600)
    assert reach("prose", 6, 0.95) > reach("prose", 6)
    assert reach("chat", 6) > reach("retrieval", 6)  # a kind that never ran
    both = {"prose": 0.01, "retrieval": 0.01}
    assert after.reach(both, dict.fromkeys(both, 6), True, 0.8) < reach("retrieval", 6)
    # What no level moves is as uncertain as before, and so is all before anything ran.
    for one, evicts in ((after, False), (before, True), (before.levelled(None, 1), True)):
        assert one.reach({"prose": 0.01}, {"prose": 6}, evicts, 0.8) == CURVES.reach(
            {"prose": 0.01}, {"prose": 6}, evicts, 0.8
        )


def test_after_rounds_intervals_hold_other_texts_as_often_as_they_say() -> None:
    """Runs, kinds and texts differ by random effects, of which all widths are made."""
    rng, spread = np.random.default_rng(3), 0.3

    def run(shown: int, judged: int) -> list[float]:
        """How many deviations each kind of one search lies off by."""
        kinds = [f"kind {number}" for number in range(6)]
        own = rng.normal(0, spread) + rng.normal(0, spread / np.sqrt(KIND_TEXTS), 6)
        texts = own[:, None] + rng.normal(0, spread, (6, shown))
        every = tuple(np.repeat(kinds, shown).tolist())
        found = levels_of([Seen(every, np.ones(6 * shown), np.exp(texts).ravel())], spread)
        assert found is not None
        later = np.exp(own[:, None] + rng.normal(0, spread, (6, judged))).mean(1)
        counts = dict.fromkeys(kinds, judged)
        return [
            abs(float(np.log(live) - found.of(kind))) / found.deviation({kind: 1.0}, counts)
            for kind, live in zip(kinds, later, strict=True)
        ]

    seen = [size for _ in range(200) for size in run(2, 3)]
    for shown, judged in ((1, 1), (2, 3), (4, 6), (8, 16)):
        held = [size <= conformal(seen, 0.8) for _ in range(200) for size in run(shown, judged)]
        assert np.mean(held) == pytest.approx(0.8, abs=0.06), (shown, judged)


def test_scatter_and_samples_widen_the_interval_together() -> None:
    losses = [0.010, 0.012, 0.030, 0.034]
    found = calibrated(CURVES, losses, KINDS, "table", evicts=True)
    alone = estimate(CURVES.applied(losses, KINDS, True), KINDS, "table")
    assert found.value == pytest.approx(CURVES.mean(losses, KINDS, True))
    assert found.low < alone.low < found.value < alone.high < found.high
    factor = float(np.exp(0.3))  # the mean of both kinds' scatter
    assert found.high < alone.high * factor
    assert calibrated(CURVES, [0.0] * 4, KINDS, "table", evicts=True).high == 0


# The packaged calibration


def test_the_packaged_calibration_leaves_what_is_nearly_right_nearly_as_it_is() -> None:
    shipped = packaged_calibration()
    assert set(shipped.curves) == set(get_args(Regime))
    assert shipped.runs > 500
    for kind in ("prose", "retrieval"):
        for predicted in (0.0011, 0.0047):
            assert 0.9 < shipped.value(predicted, kind, True) / predicted < 1.3
    assert shipped.value(0.08, "retrieval", True) > 1.2 * 0.08  # errors feed on each other
    assert 0.1 < shipped.after_rounds.spread < 0.5
    after = shipped.levelled(levels(), 2)
    for kind in ("prose", "retrieval"):
        narrow, wide = (one.reach({kind: 0.01}, {kind: 6}, True, 0.8) for one in (after, shipped))
        assert 0.05 < narrow < wide


def test_a_packaged_calibration_never_turns_two_plans_round() -> None:
    shipped, losses = packaged_calibration(), np.geomspace(1e-6, 3, 400)
    for kind in ("prose", "retrieval"):
        for evicts in (False, True):
            moved = [shipped.value(each, kind, evicts) for each in losses]
            assert moved == sorted(moved)


def test_a_calibration_reads_back_and_a_damaged_one_is_refused() -> None:
    whole = replace(CURVES, after_rounds=AfterRounds(0.25, (0.1, 1.5)))
    plain: Any = json.loads(json.dumps(write_calibration(whole, "a test")))
    assert read_calibration(plain, "x") == whole
    faults = {"log_ratios": [0.1], "knots": [1.0, 0.1], "residuals": [0.2, -0.2]}
    for name, value in faults.items():
        damaged = json.loads(json.dumps(plain))
        damaged["curves"]["evicting"][name] = value
        with pytest.raises(KvtuneError):
            read_calibration(damaged, "x")
    for fault in ({"format": 3}, {"after_rounds": {"spread": 0.2, "sizes": [2.0, 1.0]}}):
        with pytest.raises(KvtuneError):
            read_calibration({**plain, **fault}, "x")


def test_a_lower_level_gives_a_narrower_interval_around_the_same_loss() -> None:
    losses, kinds = [0.02, 0.03, 0.05], ["prose", "code", "retrieval"]
    wide, narrow = (
        calibrated(CURVES, losses, kinds, "table", evicts=True, level=level)
        for level in (0.95, 0.8)
    )
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high
