"""When a study may stop: its front covers hardly more than it did many trials ago."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

PATIENCE = 40  # trials
LEAST_GAIN = 0.005  # of the hypervolume, over as many


class Point(Protocol):
    """What a candidate is judged by."""

    @property
    def kl(self) -> float:
        """Loss, less is better."""

    @property
    def tokens_at_once(self) -> int:
        """What memory serves, more is better."""

    @property
    def misses(self) -> Mapping[str, float]:
        """The limits that it does not keep to; the front is of what keeps to all."""

    @property
    def weights(self) -> str:
        """The format of the weights; fronts of different formats are not compared."""


def hypervolume(points: Sequence[Point], worst_loss: float) -> float:
    """What fronts cover: loss below ``worst_loss`` times the logarithm of tokens at once.

    Summed over the formats of the weights, each of which has a front of its own.
    """
    formats = sorted({point.weights for point in points})
    return sum(_covered([p for p in points if p.weights == each], worst_loss) for each in formats)


def _covered(points: Sequence[Point], worst_loss: float) -> float:
    ordered = sorted(points, key=lambda point: point.kl)
    covered, most = 0.0, 1.0
    for point in ordered:
        if point.kl < worst_loss and point.tokens_at_once > most:
            covered += (worst_loss - point.kl) * np.log(point.tokens_at_once / most)
            most = point.tokens_at_once
    return float(covered)


def stagnates(points: Sequence[Point], patience: int = PATIENCE) -> bool:
    """Whether the last ``patience`` points added less than half a percent to what was covered.

    Points that miss a limit cover nothing, and a search that has no other goes on.

    The reference, the largest loss of the points before them, is fixed by what came first.
    """
    if len(points) <= patience:
        return False
    before, now = ([p for p in some if not p.misses] for some in (points[:-patience], points))
    worst = max((point.kl for point in before), default=0.0)
    then = hypervolume(before, worst)
    return then > 0 and hypervolume(now, worst) - then < LEAST_GAIN * then
