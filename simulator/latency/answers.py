"""What the latency model answers: seconds with their interval and how certain they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Estimate, Tier

FloatArray = npt.NDArray[np.float64]

TIERS: tuple[Tier, ...] = ("measured", "interpolated", "fitted", "transferred", "datasheet")
HALF_WIDTH = np.array([0.03, 0.05, 0.12, 0.15, 0.30])
"""Half of the 10-90 % interval of an answer of each tier, as a share of it."""


class Answer(NamedTuple):
    """Seconds with the ends of their intervals, and the index of each one's tier in ``TIERS``."""

    value: FloatArray
    low: FloatArray
    high: FloatArray
    tiers: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Times:
    """Times of many configurations, in seconds.

    Args:
        value_s: likely times, any shape.
        low_s: lower ends of the 10-90 % intervals, same shape.
        high_s: upper ends, same shape.
        tier: how the least certain of them was obtained.
        tiers: index of each one's tier in ``TIERS``; None where all have the same.
    """

    value_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    tier: Tier = "datasheet"
    tiers: npt.NDArray[np.intp] | None = None

    def at(self, *index: int) -> Estimate:
        """The estimate at one place of the arrays."""
        value, low, high = (float(part[index]) for part in (self.value_s, self.low_s, self.high_s))
        tier = self.tier if self.tiers is None else TIERS[int(self.tiers[index])]
        return Estimate(value, low, high, "s", tier)


def least_certain(*tiers: Tier) -> Tier:
    """The tier of what is put together from parts of these; below all of ``TIERS`` are priors."""
    return max(tiers, key=lambda tier: TIERS.index(tier) if tier in TIERS else len(TIERS))


def within(seconds: npt.ArrayLike, factor: float) -> Times:
    """Times by a data sheet: within a factor either way."""
    value = np.asarray(seconds, np.float64)
    return Times(value, value / factor, value * factor)


def answer_of_tier(
    value: FloatArray, low: FloatArray, high: FloatArray, tiers: npt.NDArray[np.intp]
) -> Answer:
    """Adds each tier's own width to what the priors left open, in squares."""
    width = HALF_WIDTH[tiers] * value
    return Answer(
        value,
        np.maximum(0.0, value - np.hypot(value - low, width)),
        value + np.hypot(high - value, width),
        tiers,
    )
