"""Words on the plot: each baseline by name, and how far the plan lies from the best of them."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.tui.palette import words_of
from kvtune.tuner.explore.axes import LOSS
from kvtune.tuner.explore.view import View


@dataclass(frozen=True)
class Label:
    """Words beside a point.

    Args:
        x: of the point, as the axes count.
        y: likewise.
        words: to be written.
        best: whether it is the baseline with the least loss.
    """

    x: float
    y: float
    words: str
    best: bool


def labels(view: View) -> list[Label]:
    """Baselines by their names, highest first; the best with its distance from the chosen plan."""
    found = sorted(view.baselines(), key=lambda each: -each[2])
    if not found:
        return []
    least = min(found, key=lambda each: each[2])
    return [
        Label(x, y, words_of(baseline.family) + _gap(view, y, baseline is least[0]), y == least[2])
        for baseline, x, y in found
    ]


def _gap(view: View, loss: float, best: bool) -> str:
    """`` 3.1 x the plan's loss``, where losses are drawn upward; nothing for the others."""
    chosen = view.study.chosen
    if not best or view.y is not LOSS or chosen is None or view.is_what_if:
        return ""
    ours = float(view.study.outcome.baselines[0].best.value) if view.study.outcome else 0.0
    return f" {loss / ours:.2g} x the plan's" if ours > 0 else ""


def together(points: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Columns, lines and words of points, those whose marks hide one another under one label."""
    found: list[tuple[int, int, str]] = []
    for column, line, words in points:
        if found and found[-1][1] == line and abs(found[-1][0] - column) <= 1:
            found[-1] = (column, line, f"{found[-1][2]}, {words}")
        else:
            found.append((column, line, words))
    return found


def placed(
    wanted: list[tuple[int, int, str]], width: int, height: int
) -> list[tuple[int, int, str]]:
    """Where words go, a line each: right of their points, left of them, or on a line beside.

    Args:
        wanted: column and line of each point, and its words, from above.
        width: columns of the plot.
        height: its lines.
    """
    found: list[tuple[int, int, str]] = []
    taken: set[int] = set()
    for column, line, words in wanted:
        room = (width - len(words) - 1, column - 1 - len(words))  # first columns at both ends
        right, left = column + 2 < room[0], room[1] > 0
        lines = (line, line - 1, line + 1, line - 2)[0 if right or left else 1 :]
        free = [y for y in lines if y not in taken and 0 < y < height]
        if not free or room[0] < 1:
            continue
        taken.add(free[0])
        found.append((column + 2 if right else room[1] if left else room[0], free[0], words))
    return found
