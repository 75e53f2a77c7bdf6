"""Means and intervals over samples, every kind of text counting alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.estimate import Estimate, Tier

_DRAWS = 2000


def mean_over_kinds(values: ArrayLike, kinds: Sequence[str]) -> float:
    """Mean of the kinds' means."""
    array, labels = np.asarray(values, float), np.asarray(kinds)
    return float(np.mean([array[labels == kind].mean() for kind in sorted(set(kinds))]))


def bootstrap(values: ArrayLike, kinds: Sequence[str], seed: int = 0) -> NDArray[np.float64]:
    """Means over samples redrawn within each kind, ``[draws]``.

    Kinds with a single sample each have no spread of their own; then all samples are redrawn
    together, which is wider and honest. The same seed redraws the same samples, so two policies'
    draws can be compared pair by pair.
    """
    array, labels = np.asarray(values, float), np.asarray(kinds)
    if min(Counter(kinds).values()) < 2:
        labels = np.full(len(array), "all")
    rng = np.random.default_rng(seed)
    draws = []
    for kind in sorted(set(labels)):
        rows = np.flatnonzero(labels == kind)
        draws.append(array[rng.choice(rows, (_DRAWS, len(rows)))].mean(1))
    mean: NDArray[np.float64] = np.mean(draws, 0)
    return mean


def estimate(
    values: ArrayLike, kinds: Sequence[str], tier: Tier, unit: str = "nats/token", seed: int = 0
) -> Estimate:
    """Mean with its 95 % bootstrap interval over samples."""
    low, high = np.percentile(bootstrap(values, kinds, seed), [2.5, 97.5])
    mean = mean_over_kinds(values, kinds)
    return Estimate(mean, min(float(low), mean), max(float(high), mean), unit, tier)


def estimate_by_kind(values: ArrayLike, kinds: Sequence[str], tier: Tier) -> dict[str, Estimate]:
    """The same of each kind of text alone; a kind with one sample has no interval to speak of."""
    array, labels = np.asarray(values, float), np.asarray(kinds)
    parts = {kind: array[labels == kind] for kind in sorted(set(kinds))}
    return {kind: estimate(part, [kind] * len(part), tier) for kind, part in parts.items()}
