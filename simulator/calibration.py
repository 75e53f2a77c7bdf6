"""From predicted to live: a straight line in logarithms, fitted on a few live runs.

Second-order, open-loop prediction reads low where losses are large, because errors feed on each
other. The line takes that out; its scatter widens the interval.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kvtune.common.estimate import Estimate

_SMALLEST = 1e-7  # nats/token: below this a prediction is rounding


@dataclass(frozen=True)
class Calibration:
    """log(live) = intercept + slope * log(predicted), give or take ``spread``.

    Args:
        intercept: 0 leaves predictions as they are.
        slope: 1 leaves predictions as they are.
        spread: standard deviation of the rest, in natural logarithms.
        runs: live runs behind it; 0 for none.
    """

    intercept: float = 0.0
    slope: float = 1.0
    spread: float = 0.0
    runs: int = 0

    def value(self, predicted: float) -> float:
        """What a live run should show, nats/token."""
        if predicted <= _SMALLEST:
            return predicted
        return float(np.exp(self.intercept + self.slope * np.log(predicted)))

    def apply(self, predicted: Estimate) -> Estimate:
        """The estimate moved onto the line, its interval widened by the spread."""
        widen = float(np.exp(1.96 * self.spread))
        low, high = self.value(predicted.low) / widen, self.value(predicted.high) * widen
        return Estimate(self.value(predicted.value), low, high, predicted.unit, predicted.tier)

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into files."""
        return asdict(self)


NONE = Calibration()


def calibrate(predicted: ArrayLike, live: ArrayLike, *, level_only: bool = False) -> Calibration:
    """Fit the line by least absolute deviations on pairs of means over samples.

    Args:
        predicted: KL of several policies, nats/token.
        live: the same policies, run.
        level_only: keep the slope at 1, for a handful of runs.
    """
    x, y = np.log(np.maximum(predicted, _SMALLEST)), np.log(np.maximum(live, _SMALLEST))
    if len(x) == 0:
        return NONE
    slope = 1.0 if level_only or len(x) < 8 else _robust_slope(x, y)
    intercept = float(np.median(y - slope * x))
    rest = y - intercept - slope * x
    spread = float(1.4826 * np.median(np.abs(rest))) if len(x) > 2 else 0.25
    return Calibration(intercept, slope, spread, len(x))


def _robust_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Theil-Sen: the median of the slopes between all pairs (Sen, JASA 1968)."""
    from scipy.stats import theilslopes

    return float(theilslopes(y, x).slope)
