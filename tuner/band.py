"""A stand-in's loss as a band: what another model may lose with the same option for all heads.

One number would claim more than is known: the source is another model, which read other texts.
The band reaches from the kind of text that loses least on the source to the kind that loses most,
and is widened by what was seen between models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.estimate import BAND, Estimate
from kvtune.simulator.quality.calibration import Calibration
from kvtune.tuner.quality import mean_over_kinds

SAMPLES = (10, 90)  # percentiles over a kind's samples
FACTOR = 5.7
"""How many times below and above its source another model may lie.

Two models are exchangeable: where one may lose so many times what the other does, a third may lose
as many times less. The factor is therefore the same both ways. It is what 90 % of the cells (a
model, a rule or an option, a share) of SmolLM2 and Gemma-3-270M need, each the other's source, in
the group of cells that needs most: options for all heads that ran live on prompts a quarter as long
as the source's (``benchmarks/stand_in_factors.py``, ``benchmarks/results/stand-in-factors.json``).
"""

FACTOR_BY_FAMILY = {"kvzip": 9.0}
"""The same of a published rule, where that is further.

From the same file: KVzip needs up to 2.6 between prompts of the same length, and up to 8.9 where
the other model's are a fifth as long.
"""


def band(
    losses: ArrayLike, kinds: Sequence[str], calibration: Calibration, *, evicts: bool
) -> Estimate:
    """The band of one policy, around the source's own calibrated mean.

    It holds both what the source's calibration says and what its tables said before.

    Args:
        losses: of the source's samples, before calibration, nats/token.
        kinds: of text, one a sample.
        calibration: from predicted to live, of the source.
        evicts: whether the policy keeps less than all tokens.
    """
    before, after = np.asarray(losses, float), calibration.applied(losses, kinds, evicts)
    mean = mean_over_kinds(after, kinds)
    ends = (*_ends(np.stack([before, after]), kinds), mean, mean_over_kinds(before, kinds))
    return _widened(mean, ends)


def band_by_kind(
    losses: ArrayLike, kinds: Sequence[str], calibration: Calibration, *, evicts: bool
) -> dict[str, Estimate]:
    """The band of each kind of text alone."""
    array, labels = np.asarray(losses, float), np.asarray(kinds)
    parts = {kind: array[labels == kind] for kind in sorted(set(kinds))}
    return {
        kind: band(part, [kind] * len(part), calibration, evicts=evicts)
        for kind, part in parts.items()
    }


def _ends(losses: NDArray[np.float64], kinds: Sequence[str]) -> tuple[float, float]:
    """The loss on the kind that loses least and on the one that loses most, of rows ``[., n]``."""
    labels = np.asarray(kinds)
    parts = [np.percentile(losses[:, labels == kind], SAMPLES, axis=1) for kind in set(kinds)]
    return float(min(part[0].min() for part in parts)), float(max(part[1].max() for part in parts))


def band_of_live(
    kl: float, interval: Sequence[float], by_kind: Mapping[str, float], family: str = "uniform"
) -> Estimate:
    """The band of a policy that ran live on the source: its interval and its kinds of text."""
    return _widened(kl, (kl, *interval, *by_kind.values()), factor(family))


def factor(family: str = "uniform") -> float:
    """How many times below and above its source another model may lie with a family's rules."""
    return FACTOR_BY_FAMILY.get(family, FACTOR)


def needed_factor(found: Estimate, loss: float, family: str = "uniform") -> float:
    """The factor that a band of a family would need to hold this loss; below 1 needs none."""
    return float(factor(family) * max(loss / found.high, found.low / loss))


def _widened(value: float, ends: Sequence[float], times: float = FACTOR) -> Estimate:
    return Estimate(value, min(ends) / times, max(ends) * times, "nats/token", BAND)
