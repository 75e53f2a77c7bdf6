"""The front as a plot that one moves along, with keys and mouse.

Drawn by textual-plot: it is a widget itself, numpy in and mouse positions out; plotext, the other
library there is, draws one long string and cannot tell where it was clicked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from textual import events, on
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding
from textual.containers import Grid
from textual.message import Message
from textual.reactive import reactive
from textual_hires_canvas import Canvas
from textual_plot import HiResMode, PlotWidget
from textual_plot.plot_widget import Legend

from kvtune.tui.palette import CHOSEN, FRONT, GROUPS, MARKED, SELECTED, colours_of, mark_of
from kvtune.tui.widgets.canvas import PlotCanvas
from kvtune.tui.widgets.plot_labels import labels, placed, together
from kvtune.tui.widgets.ticks import LogTicks, nothing_of, place, zero_of
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.view import View

_CELLS = 100  # points closer than this share of the plot cannot be told apart


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
        self._theme = ""  # that the ground was drawn in
        self._baseline_names: list[tuple[int, int, str]] = []  # column, line and words
        self._x_zero: float | None = None
        self._y_zero: float | None = None

    def compose(self) -> ComposeResult:
        """Textual-plot's own parts, on canvases that can go without colour."""
        with Grid():
            for part in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield PlotCanvas(id=part)
        yield Legend(id="legend")

    def render(self) -> RenderResult:
        """Draw on the canvases; they are told to repaint once, not for every mark."""
        with ExitStack() as stack:
            for canvas in self.query(PlotCanvas):
                stack.enter_context(canvas.batch_refresh())
            return super().render()

    def _update_legend(self) -> None:
        """Nothing: the explorer has a legend of its own, and this one would cost a layout."""

    def show(self, view: View, row: int | None, marked: int | None) -> None:
        """Draw a view with its cursor; where only the cursor moved, only the cursor."""
        old, theme = self.view, self._theme
        self.view, self.row, self.marked, self._theme = view, row, marked, self.app.theme
        if view is not old:
            self._fit(view)
        if view is not old or self._theme != theme:
            self._lay_ground(view)
            self.render()  # now, so that canvases and plan reach the screen in one pass
        elif not self._needs_rerender:
            canvas = self.query_one("#plot", PlotCanvas)
            with canvas.batch_refresh():
                canvas.restore_ground()
                self._draw_cursor(view, canvas)

    def _lay_ground(self, view: View) -> None:
        """Everything but the cursor."""
        colours = colours_of(self.app)
        what_if = "WHAT IF (esc leaves): " if view.is_what_if else ""
        self.border_title = f" {what_if}{view.y.words} "
        self.set_class(view.is_what_if, "-what-if-on")
        self.border_subtitle = f" {view.x.words} "
        self.clear()
        self._plot_lines(view, colours["muted"])
        self._plot_plans(view, colours["muted"], colours["primary"])
        self._plot_baselines(view, colours["error"])

    def _render_plot(self) -> None:
        """Textual-plot's picture, words on it, and the cursor on all that."""
        super()._render_plot()
        canvas = self.query_one("#plot", PlotCanvas)
        if self.view is None or canvas._canvas_size is None:
            return
        self._place_labels(self.view, canvas)
        canvas.keep_ground()
        self._draw_cursor(self.view, canvas)

    def _place_labels(self, view: View, canvas: PlotCanvas) -> None:
        colour, points = colours_of(self.app)["error"], []
        for each in labels(view):
            x, y = self._place_x([each.x])[0], self._place_y([each.y])[0]
            if self._x_min <= x <= self._x_max and self._y_min <= y <= self._y_max:
                points.append((*self.get_pixel_from_coordinate(x, y), each.words))
        self._baseline_names = [
            (column, line, f"[{colour}]{words}[/]")
            for column, line, words in placed(together(points), *canvas.size)
        ]

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
        colours, groups = colours_of(self.app), list(view.groups.values())
        styles = [colours[GROUPS[min(n, len(GROUPS) - 1)]] for n in range(len(groups))]
        for rows, style in zip(groups, styles, strict=True):
            seen = np.intersect1d(rows, self._seen)
            dots = HiResMode.BRAILLE
            self.scatter(*self._positions(view, seen), marker_style=style, hires_mode=dots)
        for rows, style in zip(groups, styles, strict=True):  # above all other plans
            best = np.intersect1d(rows, view.front)
            self.scatter(*self._positions(view, best), marker=FRONT, marker_style=style)

    def _plot_baselines(self, view: View, colour: str) -> None:
        for baseline, across, upward in view.baselines():
            x, y = self._place_x([across]), self._place_y([upward])
            self.scatter(x, y, marker=mark_of(baseline.family), marker_style=f"bold {colour}")

    def _draw_cursor(self, view: View, canvas: PlotCanvas) -> None:
        """The selected plan's interval, names of baselines, and marks of single plans above all."""
        colours = colours_of(self.app)
        chosen, selected = colours["success"], colours["accent"]
        if self.row is not None:
            self._draw_interval(view, self.row, canvas, selected)
        for label in self._baseline_names:  # above the interval, which would cross them out
            canvas.write_text(*label)
        for row, mark, colour in (
            (view.study.chosen, CHOSEN, chosen),
            (self.marked, MARKED, selected),
            (self.row, SELECTED, selected),
        ):
            if row is not None:
                (x,), (y,) = self._positions(view, np.array([row]))
                if self._x_min <= x <= self._x_max and self._y_min <= y <= self._y_max:
                    at = self.get_pixel_from_coordinate(x, y)
                    canvas.set_pixel(*at, char=mark, style=f"bold {colour}")

    def _draw_interval(self, view: View, row: int, canvas: PlotCanvas, colour: str) -> None:
        x = np.clip(self._place_x(view.across[row]), self._x_min, self._x_max)
        y = np.clip(self._place_y(view.upward[row]), self._y_min, self._y_max)
        pixel = self.get_hires_pixel_from_coordinate
        lines = [
            (*pixel(x[1], y[0]), *pixel(x[2], y[0])),
            (*pixel(x[0], y[1]), *pixel(x[0], y[2])),
        ]
        canvas.draw_hires_lines(lines, HiResMode.BRAILLE, colour)

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


def _padded(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 0.05
    return low - room, high + room


def _cells(values: Floats) -> NDArray[np.int64]:
    spread = float(np.ptp(values)) if len(values) else 0.0
    cells: NDArray[np.int64] = np.round(values / (spread or 1.0) * _CELLS).astype(np.int64)
    return cells
