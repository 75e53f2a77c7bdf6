"""Logarithmic axes of the plot: where values and ticks lie, and where next to nothing is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

import numpy as np
from textual_plot import AxisFormatter

from kvtune.tui.palette import short
from kvtune.tuner.explore.plans import Floats

_NOTHING = 1e-12


class LogTicks(AxisFormatter):
    """Ticks at 1, 2, 5 of every power of ten, for positions that are logarithms."""

    def __init__(self, zero: float | None = None, nothing: str = "0") -> None:
        self.zero, self.nothing = zero, nothing

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        """Positions between the ends; fewer steps where the range is wide."""
        if self.zero is not None and min_ <= self.zero <= max_:
            return [self.zero, *self._between(self.zero + 0.2, max_, max_ticks - 1)]
        return self._between(min_, max_, max_ticks)

    @staticmethod
    def _between(min_: float, max_: float, max_ticks: int) -> list[float]:
        for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
            ticks = [
                power + log10(step)
                for power in range(floor(min_) - 1, ceil(max_) + 1)
                for step in steps
                if min_ <= power + log10(step) <= max_
            ]
            if len(ticks) <= max_ticks - 1:
                return ticks if len(ticks) > 1 else _even(min_, max_)
        return ticks[:: ceil(len(ticks) / max_ticks)]

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        """``0.02``, ``50``, ``16k``; ``0`` or ``<1e-6`` where what is not to scale is drawn."""
        return [self.nothing if tick == self.zero else short(10**tick) for tick in ticks]


def _even(min_: float, max_: float) -> list[float]:
    """Three ticks of as few digits as tell them apart, where no round number lies between."""
    values = [10**x for x in np.linspace(min_, max_, 5)[1:-1]]
    for digits in range(1, 7):
        rounded = sorted({float(f"{value:.{digits}g}") for value in values})
        inside = [log10(v) for v in rounded if min_ <= log10(v) <= max_]
        if len(inside) == len(values):
            return inside
    return [log10(value) for value in values]


_DECADES = 5  # below the largest value that are drawn to scale


def zero_of(values: Floats) -> float | None:
    """Where what is too small for a logarithmic axis is drawn, a step below the rest; or None.

    Too small is five decades below the largest: one plan with next to no loss would else squash
    all others.
    """
    some = values[values > max(_NOTHING, 10.0**-_DECADES * float(values.max(initial=0.0)))]
    if len(some) == len(values) or not len(some):
        return None
    return float(np.log10(some.min()) - 0.3)


def nothing_of(values: Floats, zero: float | None) -> str:
    """What the tick at ``zero`` says: ``0``, or less than the least that is drawn to scale."""
    if zero is None or (values[np.log10(np.maximum(values, _NOTHING)) < zero] <= _NOTHING).all():
        return "0"
    return f"<{short(10 ** (zero + 0.3))}"


def place(values: Sequence[float] | Floats, zero: float | None) -> Floats:
    """Where values lie on a logarithmic axis."""
    array = np.asarray(values, np.float64)
    least = np.log10(_NOTHING) if zero is None else zero
    return np.asarray(np.maximum(np.log10(np.maximum(array, _NOTHING)), least))
