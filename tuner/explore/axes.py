"""What plans are plotted, filtered and ranked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtune.common.units import MIB
from kvtune.policies.option import Option
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.what_if import Figures


@dataclass(frozen=True)
class Axis:
    """One figure of a plan.

    Args:
        name: for keys and files.
        label: for people, with its unit.
        less_is_better: which way is good.
        column: value, low, high of every plan, ``[n, 3]``.
    """

    name: str
    label: str
    less_is_better: bool
    column: Callable[[Study, Figures], Floats]

    @property
    def words(self) -> str:
        """The label, and which way is good."""
        return f"{self.label} ({'less' if self.less_is_better else 'more'} is better)"


def _counted(column: NDArray[np.number]) -> Floats:
    """A figure that is exact: its interval is itself."""
    return np.repeat(np.asarray(column, np.float64)[:, None], 3, axis=1)


AXES: tuple[Axis, ...] = (
    Axis("loss", "KL, nats/token", True, lambda study, _: study.plans.kl),
    Axis("bytes", "MiB of a prompt", True, lambda _, f: _counted(f.prompt_bytes / MIB)),
    Axis("tokens", "tokens that fit", False, lambda _, f: _counted(f.tokens_that_fit)),
    Axis("step", "ms a token", True, lambda _, f: 1e3 * f.step_s),
    Axis("rate", "tokens/s", False, lambda _, f: f.tokens_per_s),
)
LOSS, BYTES, TOKENS, STEP, RATE = AXES


def front(x: Floats, y: Floats, x_axis: Axis, y_axis: Axis) -> NDArray[np.int64]:
    """Rows that no other beats in both figures, from the best ``x`` to the worst.

    Args:
        x: values of one figure, ``[n]``.
        y: of another, ``[n]``.
        x_axis: says which way is good.
        y_axis: likewise.
    """
    across = x if x_axis.less_is_better else -x
    upward = y if y_axis.less_is_better else -y
    order = np.lexsort((np.arange(len(x)), upward, across))
    if not len(order):
        return order
    best = np.minimum.accumulate(upward[order])
    better = np.r_[True, best[1:] < best[:-1]]
    found: NDArray[np.int64] = order[better]
    return found


@dataclass(frozen=True)
class Filter:
    """Which plans are shown; everything is unless it says otherwise.

    Args:
        largest_kl: loss, nats/token.
        split: ``heads``, ``layers`` or ``pairs`` (of layers): what has an option of its own.
        method: a plan must use it somewhere.
        least_bits: no narrower format is used.
        fits: only those whose peak is within the limit.
    """

    largest_kl: float | None = None
    split: str | None = None
    method: str | None = None
    least_bits: int | None = None
    fits: bool = False

    @property
    def words(self) -> str:
        """What it lets through, in words; "" for everything."""
        parts = [
            f"KL <= {self.largest_kl:g}" if self.largest_kl is not None else "",
            f"by {self.split}" if self.split else "",
            f"with {self.method}" if self.method else "",
            f">= {self.least_bits} bits" if self.least_bits else "",
            "that fit" if self.fits else "",
        ]
        return ", ".join(part for part in parts if part)

    def rows(self, study: Study, figures: Figures) -> NDArray[np.int64]:
        """The rows that it lets through."""
        plans = study.plans
        keep = np.ones(len(plans), bool)
        if self.largest_kl is not None:
            keep &= plans.kl[:, 0] <= self.largest_kl
        if self.split:
            keep &= np.array([p.get("split") == self.split for p in plans.parameters], bool)
        if self.method:
            keep &= self._using(study, self.method)
        if self.least_bits:
            keep &= ~self._narrower(study, self.least_bits)
        if self.fits:
            keep &= figures.fits
        return np.flatnonzero(keep)

    @staticmethod
    def _using(study: Study, method: str) -> NDArray[np.bool_]:
        return study.using(o.method.name == method for o in study.facts.options)

    @staticmethod
    def _narrower(study: Study, least: int) -> NDArray[np.bool_]:
        return study.using(option_bits(o)[0] < least for o in study.facts.options)


EVERYTHING = Filter()


def option_bits(option: Option) -> tuple[int, int]:
    """The narrower and the wider of an option's formats, bits an element."""
    pair = (option.keys.bits, option.values.bits)
    return min(pair), max(pair)
