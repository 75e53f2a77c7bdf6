"""The picture of a comparison: held-out loss against the time that each strategy had used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtune.tui.report.drawing import COLOURS, Draw
from kvtune.tuner.compare.result import Comparison, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "tuner": "green",
    "nsga2": "red",
    "random": "soft",
    "greedy": "amber",
    "layers": "blue",
}


def comparison_chart(found: Comparison, share: float) -> Draw:
    """One size: a line for each strategy, its last loss held until the time was over."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("seconds")
        axes.set_ylabel(f"held-out KL, nats/token, at {100 * share:g} % of the bytes")
        axes.grid(True, which="major", linewidth=0.6)
        for outcome in found.at(share):
            if outcome.points:
                _line(axes, outcome, found.seconds)
        axes.figure.legend(fontsize=8, ncols=3, loc="outside lower center")

    return draw


def _line(axes: Axes, outcome: Outcome, seconds: float) -> None:
    colour = COLOURS[_COLOURS[outcome.strategy]]
    at = [max(point.seconds, 0.1) for point in outcome.points]
    losses = [point.kl for point in outcome.points]
    axes.step(
        [*at, max(seconds, at[-1])],
        [*(loss.value for loss in losses), losses[-1].value],
        where="post",
        color=colour,
        linewidth=1.2,
        label=outcome.words,
    )
    below = [max(loss.value - loss.low, 0) for loss in losses]
    above = [max(loss.high - loss.value, 0) for loss in losses]
    values = [loss.value for loss in losses]
    axes.errorbar(at, values, [below, above], fmt="o", color=colour, markersize=4, capsize=2)
