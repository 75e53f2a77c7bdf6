"""The front of a study as a picture: plans, the chosen one, baselines and limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvtune.tui.palette import short, words_of
from kvtune.tui.report import hover
from kvtune.tui.report.drawing import COLOURS, FAMILIES, Draw, inches, legend_columns
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

_NAME_HEIGHT = 11.0  # points between the names of two baselines


def front_chart(view: View) -> Draw:
    """All plans, the front, the chosen plan with its interval, baselines and limits."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(view.x.words)
        axes.set_ylabel(view.y.words)
        axes.grid(True, which="major", linewidth=0.6)
        _plans(axes, view)
        _chosen(axes, view)
        _baselines(axes, view)
        for line in view.lines:
            mark = axes.axvline if line.axis is view.x else axes.axhline
            mark(line.value, color=COLOURS["soft"], linestyle=":", linewidth=1.2, label=line.words)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: short(value))
            axis.set_minor_formatter(_plain_labels())
        columns = legend_columns(axes, 5)
        axes.figure.legend(fontsize=8, ncols=columns, loc="outside lower center")

    return draw


def _plain_labels() -> Formatter:
    """Labels between powers of ten where there are few of these, as text.

    Matplotlib's own are formulas, and reading these took a tenth of the report's time.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return short(x) if super().__call__(x, pos) else ""

    return Plain()


def _plans(axes: Axes, view: View) -> None:
    others = np.setdiff1d(view.rows, view.front)
    axes.scatter(
        view.across[others, 0],
        view.upward[others, 0],
        s=10,
        alpha=0.4,
        linewidth=0,
        color=COLOURS["soft"],
        label="other plans",
        rasterized=len(others) > 2000,
    )
    front = view.front
    axes.plot(
        view.across[front, 0],
        view.upward[front, 0],
        "o-",
        color=COLOURS["blue"],
        markersize=5,
        linewidth=1,
        label="front",
        gid=hover.FRONT,
    )


def _chosen(axes: Axes, view: View) -> None:
    row = view.study.chosen
    if row is None:
        return
    x, y = view.across[row], view.upward[row]
    axes.errorbar(
        x[0],
        y[0],
        xerr=reach(x),
        yerr=reach(y),
        fmt="*",
        color=COLOURS["green"],
        markersize=13,
        capsize=3,
        label="chosen, with its interval" if view.study.outcome else "best so far",
        zorder=5,
    )


def reach(ends: Floats) -> Floats:
    """How far intervals reach below and above their values, ``[3]`` or ``[3, n]``: ``[2, n]``."""
    value, low, high = ends.reshape(3, -1)
    return np.maximum([value - low, high - value], 0)


def _baselines(axes: Axes, view: View) -> None:
    """A cross for each baseline, and its name beside it, moved apart from the others' names."""
    lowest_first = sorted(view.baselines(), key=lambda found: found[2])
    for baseline, x, y in lowest_first:
        colour = COLOURS[FAMILIES.get(baseline.family, "red")]
        axes.plot(x, y, "x", color=colour, markersize=7, markeredgewidth=2, zorder=4)
    heights = _apart([_height(axes, y) for _, _, y in lowest_first])
    for (baseline, x, y), height in zip(lowest_first, heights, strict=True):
        colour = COLOURS[FAMILIES.get(baseline.family, "red")]
        axes.annotate(
            f"{words_of(baseline.family)} {y:.2g}",
            (x, y),
            xytext=(12, height - _height(axes, y) - 3),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": COLOURS["line"], "linewidth": 0.8},
            bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _height(axes: Axes, value: float) -> float:
    """Where a value lies on the logarithmic axis, in points above its start, roughly."""
    low, high = axes.get_ylim()
    share = (np.log(max(value, low)) - np.log(low)) / (np.log(high) - np.log(low))
    return float(share * inches(axes)[1] * 72 * 0.85)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved up as far as each needs to stand clear of the one below."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _NAME_HEIGHT) if found else height)
    return found
