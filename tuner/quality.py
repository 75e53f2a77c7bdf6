"""Means and intervals over samples, every kind of text counting alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.estimate import Estimate, Tier
from kvtune.simulator.quality.calibration import Calibration

_DRAWS = 2000
_PRIOR = 2  # texts that the spread of all kinds counts as, in a kind's own
_WIDEST = 5.0  # logarithms: two samples that differ much would give an interval beyond all floats


def mean_over_kinds(values: ArrayLike, kinds: Sequence[str]) -> float:
    """Mean of the kinds' means."""
    array, labels = np.asarray(values, float), np.asarray(kinds)
    return float(np.mean([array[labels == kind].mean() for kind in sorted(set(kinds))]))


def bootstrap(values: ArrayLike, kinds: Sequence[str], seed: int = 0) -> NDArray[np.float64]:
    """Means over samples redrawn within each kind, ``[draws]``.

    The same seed redraws the same samples, so two policies' draws can be compared pair by pair.
    """
    array, labels = np.asarray(values, float), _strata(kinds)
    rng = np.random.default_rng(seed)
    draws = []
    for kind in sorted(set(labels)):
        rows = np.flatnonzero(labels == kind)
        draws.append(array[rng.choice(rows, (_DRAWS, len(rows)))].mean(1))
    mean: NDArray[np.float64] = np.mean(draws, 0)
    return mean


def mean_interval(
    values: ArrayLike, kinds: Sequence[str], level: float = 0.95
) -> tuple[float, float]:
    """Where the mean over kinds may lie, from few samples of each.

    Student's t with the degrees of freedom of unequal spreads (Welch; Satterthwaite 1946), in the
    logarithm of the mean where no sample is negative: losses are skewed, and redrawing three or
    four samples knows nothing beyond the largest of them. Simulated with 3 to 8 samples a kind
    from exponential, gamma and log-normal losses, and from recorded ones, intervals of 95 % hold
    the mean in 90 to 97 % of the draws, where the bootstrap's percentiles hold it in 75 to 93 %
    (``benchmarks/results/interval-coverage.json``).
    """
    array = np.asarray(values, float)
    mean = mean_over_kinds(values, kinds)
    reach = _reach(array, kinds, level)
    if array.min() < 0 or not reach:
        return mean - reach, mean + reach
    factor = float(np.exp(min(reach / mean, _WIDEST)))
    return mean / factor, mean * factor


def ratio_interval(
    above: ArrayLike, below: ArrayLike, kinds: Sequence[str], level: float = 0.95
) -> tuple[float, float, float]:
    """How many times the mean of ``below`` that of ``above`` is, and where that may lie.

    Both are of the same samples, so that what makes a sample hard cancels: each sample's difference
    of the two, both over their means, is to first order what it adds to the ratio's logarithm. One
    sample alone, or a mean that is not positive, says nothing: the interval is then unbounded.
    """
    tops, bottoms = np.asarray(above, float), np.asarray(below, float)
    mean_above, mean_below = mean_over_kinds(tops, kinds), mean_over_kinds(bottoms, kinds)
    if min(mean_above, mean_below) <= 0:
        return float("nan"), 0.0, float("inf")
    if len(tops) < 2:
        return mean_above / mean_below, 0.0, float("inf")
    reach = _reach(tops / mean_above - bottoms / mean_below, kinds, level)
    ratio, factor = mean_above / mean_below, float(np.exp(min(reach, _WIDEST)))
    return ratio, ratio / factor, ratio * factor


def _reach(array: NDArray[np.float64], kinds: Sequence[str], level: float) -> float:
    """Half the width of the interval of a mean over kinds; 0 where a sample stands alone."""
    from scipy.special import stdtrit  # scipy.stats calls it too, and takes a second to import

    labels = _strata(kinds)
    parts = [array[labels == kind] for kind in sorted(set(labels))]
    if min(len(part) for part in parts) < 2:
        return 0.0
    squares = np.array([part.var(ddof=1) / len(part) for part in parts]) / len(parts) ** 2
    total = float(squares.sum())
    if total == 0:
        return 0.0
    freedom = total**2 / float(sum(squares**2 / [len(part) - 1 for part in parts]))
    reach: float = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(total)
    return reach


def _strata(kinds: Sequence[str]) -> NDArray[np.str_]:
    """Kinds of text, or one for all where a kind has a single sample.

    Such a kind has no spread of its own; taken together with the others it is wider and honest.
    """
    labels = np.asarray(kinds)
    return labels if min(Counter(kinds).values()) > 1 else np.full(len(labels), "all")


def estimate(
    values: ArrayLike,
    kinds: Sequence[str],
    tier: Tier,
    unit: str = "nats/token",
    level: float = 0.95,
) -> Estimate:
    """Mean with its interval over samples."""
    low, high = mean_interval(values, kinds, level)
    return Estimate(mean_over_kinds(values, kinds), low, high, unit, tier)


def calibrated(
    calibration: Calibration,
    losses: ArrayLike,
    kinds: Sequence[str],
    tier: Tier,
    *,
    evicts: bool,
    level: float = 0.95,
) -> Estimate:
    """A policy's predicted losses on samples as what a live run should show.

    The interval holds what samples differ by and what live runs were seen to leave the calibration
    by; the two have nothing to do with each other, so their squares add, in logarithms.
    """
    applied = calibration.applied(losses, kinds, evicts)
    found = estimate(applied, kinds, tier, level=level)
    return widened(found, calibration, applied, kinds, evicts=evicts, level=level)


def widened(
    found: Estimate,
    calibration: Calibration,
    losses: ArrayLike,
    kinds: Sequence[str],
    *,
    evicts: bool,
    level: float = 0.95,
) -> Estimate:
    """A mean of calibrated losses on samples, its interval wider by what live runs leave them by.

    Args:
        found: the mean over kinds, with what samples differ by.
        calibration: by which they were calibrated.
        losses: of every sample, nats/token.
        kinds: of text, one a sample.
        evicts: whether the policy keeps less than all tokens.
        level: of the interval.
    """
    if found.value <= 0:
        return found
    array, labels = np.asarray(losses, float), np.asarray(kinds)
    means = {kind: float(array[labels == kind].mean()) for kind in sorted(set(kinds))}
    reach = calibration.reach(means, Counter(kinds), evicts, level)
    down = np.hypot(np.log(found.value / found.low), reach)
    up = np.hypot(np.log(found.high / found.value), reach)
    low, high = found.value * np.exp(-down), found.value * np.exp(up)
    return Estimate(found.value, float(low), float(high), found.unit, found.tier)


def calibrated_by_kind(
    calibration: Calibration,
    losses: ArrayLike,
    kinds: Sequence[str],
    tier: Tier,
    *,
    evicts: bool,
) -> dict[str, Estimate]:
    """As ``calibrated``, of each kind of text alone."""
    applied, labels = calibration.applied(losses, kinds, evicts), np.asarray(kinds)
    found = estimate_by_kind(applied, kinds, tier)
    parts = {kind: applied[labels == kind] for kind in found}
    return {
        kind: widened(each, calibration, parts[kind], [kind] * len(parts[kind]), evicts=evicts)
        for kind, each in found.items()
    }


def estimate_by_kind(values: ArrayLike, kinds: Sequence[str], tier: Tier) -> dict[str, Estimate]:
    """The mean of each kind of text alone, with where it may lie for other texts of that kind.

    Two texts of a kind know little of how such texts differ, those of other kinds know more: a
    moderated t (Smyth 2004) takes a kind's own spread, relative to its mean, and that of the other
    kinds as if ``_PRIOR`` more texts had shown it. Where every kind has one text, what kinds differ
    by stands in, which is wider. How often it holds: ``benchmarks/interval_coverage.py``.
    """
    array, labels = np.asarray(values, float), np.asarray(kinds)
    parts = {kind: array[labels == kind] for kind in sorted(set(kinds))}
    found = {}
    for kind, part in parts.items():
        others = [other for name, other in parts.items() if name != kind]
        known = [other for other in others if len(other) > 1]
        if not known and len(part) == 1:
            known = [np.array([each.mean() for each in parts.values()])]
        mean, reach = float(part.mean()), _moderated(part, known)
        factor = float(np.exp(min(reach, _WIDEST)))
        found[kind] = Estimate(mean, mean / factor, mean * factor, "nats/token", tier)
    return found


def _moderated(part: NDArray[np.float64], others: Sequence[NDArray[np.float64]]) -> float:
    """Half the width of a kind's 95 % interval, in logarithms; 0 where nothing shows a spread."""
    from scipy.special import stdtrit

    freedom, own = sum(len(other) - 1 for other in others), len(part) - 1
    prior = min(_PRIOR, freedom)
    if not prior + own:
        return 0.0
    theirs = sum(_relative(other) * (len(other) - 1) for other in others) / max(freedom, 1)
    square = (prior * theirs + own * _relative(part)) / (prior + own)
    reach: float = float(stdtrit(prior + own, 0.975)) * math.sqrt(square / len(part))
    return reach


def _relative(part: NDArray[np.float64]) -> float:
    """Squared spread over squared mean; nothing differs where there is one, or no loss at all."""
    mean = float(part.mean())
    return float(part.var(ddof=1)) / mean**2 if len(part) > 1 and mean > 0 else 0.0
