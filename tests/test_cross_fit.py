"""The best of many looks better on its own samples than it is; cross-fitting says what it loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tests.tiers import first
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.cross_fit import left_out
from kvtune.tuner.quality import mean_interval, mean_over_kinds, ratio_interval
from kvtune.tuner.search import run_search

KINDS = ["code"] * 2 + ["prose"] * 2 + ["retrieval"] * 4
Floats = NDArray[np.float64]


def drawn(rng: np.random.Generator, true: Floats, spread: float) -> Floats:
    """Losses of plans on samples that differ in how hard they are and in which plan suits them."""
    hard = rng.lognormal(-0.08, 0.4, len(KINDS))
    suits = rng.lognormal(-(spread**2) / 2, spread, (len(true), len(KINDS)))
    return true[:, None] * hard * suits


def means(losses: Floats) -> Floats:
    return np.array([mean_over_kinds(row, KINDS) for row in losses])


@pytest.mark.parametrize("drawn_from", first([(60, 0.3), (20, 0.6)]))
def test_the_best_of_many_is_believed_what_it_loses(drawn_from: tuple[int, float]) -> None:
    """200 searches with known losses: within its interval as often as an interval should be."""
    plans, spread = drawn_from
    rng = np.random.default_rng(0)
    naive, fitted, inside = [], [], 0
    for _ in range(200):
        true = 0.01 * rng.lognormal(0, 0.1, plans)
        losses = drawn(rng, true, spread)
        best = int(means(losses).argmin())
        unseen = left_out(losses, KINDS)
        low, high = mean_interval(unseen, KINDS)
        naive.append(means(losses)[best] / true[best])
        fitted.append(mean_over_kinds(unseen, KINDS) / true[best])
        inside += low <= true[best] <= high
    assert np.mean(naive) < 0.9, "which is what there is to correct"
    error = np.std(fitted) / np.sqrt(len(fitted))
    assert abs(np.mean(fitted) - 1) < 0.02 + 2 * error
    assert 0.86 <= inside / 200 <= 0.99


def test_a_plan_that_is_better_everywhere_needs_no_correction() -> None:
    losses = drawn(np.random.default_rng(1), np.array([0.001, 0.01, 0.02]), 0.3)
    assert left_out(losses, KINDS) == pytest.approx(losses[0])


def test_what_is_left_out_takes_no_part_in_the_choice() -> None:
    rng = np.random.default_rng(2)
    losses = drawn(rng, np.full(9, 0.01), 0.5)
    for sample in range(len(KINDS)):
        changed = losses.copy()
        changed[:, sample] = rng.random(9)
        rest = [s for s in range(len(KINDS)) if s != sample]
        labels = [KINDS[s] for s in rest]
        best = int(np.argmin([mean_over_kinds(row[rest], labels) for row in losses]))
        assert left_out(changed, KINDS)[sample] == changed[best, sample]


@pytest.mark.parametrize("kinds", [["a"], ["a", "b"], ["a", "b", "b"]])
def test_few_samples_are_enough_for_a_figure(kinds: list[str]) -> None:
    losses = np.random.default_rng(3).random((5, len(kinds)))
    found = left_out(losses, kinds)
    assert found.shape == (len(kinds),)
    assert np.isfinite(found).all()


def test_a_plan_is_called_better_only_where_the_paired_interval_says_so() -> None:
    """Of two plans that lose the same, a 95 % interval over pairs calls one better in 2 to 3 %."""
    rng = np.random.default_rng(4)
    called = 0
    for _ in range(600):
        ours, theirs = drawn(rng, np.full(2, 0.01), 0.3)
        called += ratio_interval(theirs, ours, KINDS)[1] > 1
    assert called / 600 < 0.06


def test_a_plan_that_only_luck_puts_within_the_limit_is_not_picked() -> None:
    """``--max-kl`` is held against the loss on samples that the choice did not see."""
    lucky = candidate(1, kl=0.018, sequences=60, believed=0.023)
    sound = candidate(2, kl=0.012, sequences=40, believed=0.013)
    assert pick([sound, lucky], 0.02) is sound
    assert pick([sound, lucky], 0.024) is lucky
    assert pick([sound, lucky], 0.001) is sound, "none is within: the least loss believed"


def candidate(number: int, kl: float, sequences: int, believed: float) -> Candidate:
    """A point of a front with both of its figures."""
    unseen = Estimate(believed, believed / 2, 2 * believed, "nats/token", "table")
    choice = np.zeros(1, np.int64)
    return Candidate(number, {}, choice, kl, 8192, sequences, 1, unseen=unseen)


@pytest.mark.usefixtures("one_thread")
def test_a_search_does_not_serve_what_only_luck_puts_within_the_limit(
    packaged: Tables, tmp_path: Path
) -> None:
    """A limit is put between both figures of a point of the front: it was served without it."""
    front = run_search(llama(tmp_path / "wide", largest_kl=0.1)).front
    gaps = [(p.kl, p.unseen.value) for p in front if p.unseen and p.unseen.value > 1.01 * p.kl]
    assert gaps, "a front of which no point was lucky shows nothing"
    low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
    limit = (low * high) ** 0.5
    again = run_search(llama(tmp_path / "narrow", largest_kl=limit)).front
    chosen = next(point for point in again if point.chosen)
    refused = next(p for p in again if p.unseen and abs(p.unseen.value - high) < 1e-9 * high)
    assert refused.kl <= limit < refused.believed
    assert chosen.believed <= limit
    assert chosen.sequences < refused.sequences


@pytest.mark.usefixtures("one_thread")
def test_the_front_of_a_search_says_both(packaged: Tables, tmp_path: Path) -> None:
    front = run_search(llama(tmp_path, largest_kl=0.1)).front
    known = [point for point in front if point.unseen is not None]
    assert len(known) > 3
    for point in known:
        assert point.unseen is not None
        assert point.unseen.value >= point.kl * (1 - 1e-6), "luck never makes a plan look worse"
        assert point.unseen.low <= point.unseen.value <= point.unseen.high
        assert point.believed == point.unseen.value
    chosen = next(point for point in front if point.chosen)
    assert chosen.believed <= 0.1
    more = [p for p in known if p.context_tokens * p.sequences > 8192 * chosen.sequences]
    assert all(p.believed > 0.1 for p in more)
