"""The front as a plot that one moves along, with keys and mouse.

Drawn by textual-plot: it is a widget itself, numpy in and mouse positions out; plotext, the other
library there is, draws one long string and cannot tell where it was clicked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual import events, on
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding
from textual.containers import Grid
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual_hires_canvas import Canvas
from textual_plot import AxisFormatter, HiResMode, PlotWidget
from textual_plot.plot_widget import Legend

from kvtune.tui.palette import CHOSEN, FRONT, GROUPS, MARKED, SELECTED, colours_of, mark_of, short
from kvtune.tui.widgets.plot_labels import labels, placed
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.view import View

_CELLS = 100  # points closer than this share of the plot cannot be told apart
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


class StyledCanvas(Canvas):
    """A canvas all of whose segments have a style: Textual's filter for NO_COLOR needs one."""

    def render_line(self, y: int) -> Strip:
        """One line, as drawn."""
        strip = super().render_line(y)
        styled = [Segment(s.text, s.style or Style.null(), s.control) for s in strip]
        return Strip(styled, strip.cell_length)


class FrontPlot(PlotWidget):
    """Plans as points, the front as discs, limits as lines, the selected plan with its interval."""

    BINDINGS = [  # noqa: RUF012
        Binding("left", "step(-1)", "Move", tooltip="Along the front"),
        Binding("right", "step(1)", "Move right", show=False),
        Binding("pageup", "step(-10)", "Ten plans left", show=False),
        Binding("pagedown", "step(10)", "Ten plans right", show=False),
        Binding("home", "step(-1000000)", "First plan of the front", show=False),
        Binding("end", "step(1000000)", "Last plan of the front", show=False),
        Binding("up", "step(1)", "Next plan", show=False),
        Binding("down", "step(-1)", "Previous plan", show=False),
        Binding("0,r", "reset_scales", "Whole plot", show=False),
        Binding("+", "zoom_in", "Zoom in", show=False),
        Binding("-", "zoom_out", "Zoom out", show=False),
    ]

    margin_top = reactive(0)
    margin_bottom = reactive(1)
    margin_left = reactive(8)

    @dataclass
    class Picked(Message):
        """A plan was chosen by key or mouse; its row."""

        row: int

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.view: View | None = None
        self.row: int | None = None
        self.marked: int | None = None
        self._seen: NDArray[np.int64] = np.zeros(0, np.int64)
        self._x_zero: float | None = None
        self._y_zero: float | None = None

    def compose(self) -> ComposeResult:
        """Textual-plot's own parts, on canvases that can go without colour."""
        with Grid():
            for part in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield StyledCanvas(1, 1, id=part)
        yield Legend(id="legend")

    def render(self) -> RenderResult:
        """Draw on the canvases; they are told to repaint once, not for every mark."""
        with ExitStack() as stack:
            for canvas in self.query(Canvas):
                stack.enter_context(canvas.batch_refresh())
            return super().render()

    def _update_legend(self) -> None:
        """Nothing: the explorer has a legend of its own, and this one would cost a layout."""

    def show(self, view: View, row: int | None, marked: int | None) -> None:
        """Draw a view with its cursor."""
        if view is not self.view:
            self._fit(view)
        self.view, self.row, self.marked = view, row, marked
        self.redraw()

    def redraw(self) -> None:
        """Draw again, for another cursor or theme."""
        if self.view is None:
            return
        colours = colours_of(self.app)
        what_if = "WHAT IF (esc leaves): " if self.view.is_what_if else ""
        self.border_title = f" {what_if}{self.view.y.words} "
        self.set_class(self.view.is_what_if, "-what-if-on")
        self.border_subtitle = f" {self.view.x.words} "
        self.clear()
        self._plot_lines(self.view, colours["muted"])
        self._plot_plans(self.view, colours["muted"], colours["primary"])
        self._plot_baselines(self.view, colours["error"])
        self._plot_cursor(self.view, colours["success"], colours["accent"])
        self.render()  # now, so that canvases and plan reach the screen in one pass

    def _render_plot(self) -> None:
        """Textual-plot's picture, and words on it."""
        super()._render_plot()
        canvas = self.query_one("#plot", Canvas)
        if self.view is None or canvas._canvas_size is None:
            return
        colour, points = colours_of(self.app)["error"], []
        for each in labels(self.view):
            x, y = self._place_x([each.x])[0], self._place_y([each.y])[0]
            if self._x_min <= x <= self._x_max and self._y_min <= y <= self._y_max:
                points.append((*self.get_pixel_from_coordinate(x, y), each.words))
        for column, line, words in placed(points, *canvas.size):
            canvas.write_text(column, line, f"[{colour}]{words}[/]")

    # --- parts, from the ground up ---------------------------------------------------------

    def _fit(self, view: View) -> None:
        """Room for everything shown, an interval's ends apart; zero has a place of its own."""
        self._seen = view.rows
        if not len(view.rows):
            return
        beside = list(view.baselines())
        lines_x = [line.value for line in view.lines if line.axis is view.x]
        lines_y = [line.value for line in view.lines if line.axis is view.y]
        x = np.r_[view.across[view.rows, 0], lines_x, [x for _, x, _ in beside]]
        y = np.r_[view.upward[view.rows, 0], lines_y, [y for _, _, y in beside]]
        self._x_zero, self._y_zero = zero_of(x), zero_of(y)
        self._x_formatter = LogTicks(self._x_zero, nothing_of(x, self._x_zero))
        self._y_formatter = LogTicks(self._y_zero, nothing_of(y, self._y_zero))
        self.set_xlimits(*_padded(self._place_x(x)))
        self.set_ylimits(*_padded(self._place_y(y)))
        across, upward = self._positions(view, view.rows)
        cells = np.stack([_cells(across), _cells(upward)], axis=-1)
        self._seen = view.rows[np.unique(cells, axis=0, return_index=True)[1]]

    def _place_x(self, values: Sequence[float] | Floats) -> Floats:
        return place(values, self._x_zero)

    def _place_y(self, values: Sequence[float] | Floats) -> Floats:
        return place(values, self._y_zero)

    def _plot_lines(self, view: View, colour: str) -> None:
        for line in view.lines:
            if line.axis is view.x:
                at = self._place_x([line.value])[0]
                ends = np.array([self._y_min, self._y_max])
                self.plot([at, at], ends, colour, HiResMode.BRAILLE)
            else:
                at = self._place_y([line.value])[0]
                ends = np.array([self._x_min, self._x_max])
                self.plot(ends, [at, at], colour, HiResMode.BRAILLE)

    def _plot_plans(self, view: View, faint: str, strong: str) -> None:
        x, y = self._positions(view, self._seen)
        if not view.groups:
            self.scatter(x, y, marker_style=faint, hires_mode=HiResMode.BRAILLE)
            self.scatter(*self._positions(view, view.front), marker=FRONT, marker_style=strong)
            return
        colours = colours_of(self.app)
        for number, rows in enumerate(view.groups.values()):
            style = colours[GROUPS[min(number, len(GROUPS) - 1)]]
            seen = np.intersect1d(rows, self._seen)
            best = np.intersect1d(rows, view.front)
            hires = HiResMode.BRAILLE
            self.scatter(*self._positions(view, seen), marker_style=style, hires_mode=hires)
            self.scatter(*self._positions(view, best), marker=FRONT, marker_style=style)

    def _plot_baselines(self, view: View, colour: str) -> None:
        for baseline, across, upward in view.baselines():
            x, y = self._place_x([across]), self._place_y([upward])
            self.scatter(x, y, marker=mark_of(baseline.family), marker_style=f"bold {colour}")

    def _plot_cursor(self, view: View, chosen: str, selected: str) -> None:
        if self.row is not None:
            self._plot_interval(view, self.row, selected)
        for row, mark, colour in (
            (view.study.chosen, CHOSEN, chosen),
            (self.marked, MARKED, selected),
            (self.row, SELECTED, selected),
        ):
            if row is not None:
                x, y = self._positions(view, np.array([row]))
                self.scatter(x, y, marker=mark, marker_style=f"bold {colour}")

    def _plot_interval(self, view: View, row: int, colour: str) -> None:
        x, y = self._place_x(view.across[row]), self._place_y(view.upward[row])
        x = np.clip(x, self._x_min, self._x_max)
        y = np.clip(y, self._y_min, self._y_max)
        self.plot(x[1:], y[[0, 0]], colour, HiResMode.BRAILLE)
        self.plot(x[[0, 0]], y[1:], colour, HiResMode.BRAILLE)

    def _positions(self, view: View, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        return self._place_x(view.across[rows, 0]), self._place_y(view.upward[rows, 0])

    # --- moving ----------------------------------------------------------------------------

    def action_step(self, by: int) -> None:
        """Go along the front."""
        if self.view is not None and self.row is not None:
            self.post_message(self.Picked(self.view.step(self.row, by)))

    @on(events.Click)
    def pick_nearest(self, event: events.Click) -> None:
        """The shown plan nearest to the mouse."""
        canvas = self.query_one("#plot", Canvas)
        if self.view is None or event.widget is not canvas or not len(self.view.rows):
            return
        at = event.screen_offset - canvas.region.offset
        x, y = self._positions(self.view, self.view.rows)
        columns, rows = self.get_hires_pixel_from_coordinate(x, y)  # type: ignore[arg-type]
        distance = np.square(columns - at.x - 0.5) + np.square(2 * (rows - at.y - 0.5))
        self.post_message(self.Picked(self.view.nearest(np.asarray(distance))))


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


def _padded(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 0.05
    return low - room, high + room


def _cells(values: Floats) -> NDArray[np.int64]:
    spread = float(np.ptp(values)) if len(values) else 0.0
    cells: NDArray[np.int64] = np.round(values / (spread or 1.0) * _CELLS).astype(np.int64)
    return cells
