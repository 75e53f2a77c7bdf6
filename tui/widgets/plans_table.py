"""All plans as a table: sorted by any column, searched by words; only lines on screen are made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from kvtune.tui.palette import CHOSEN, FRONT, Colours, colours_of, short
from kvtune.tuner.explore.dimensions import BITS, METHOD, SPLIT
from kvtune.tuner.explore.view import View

COLUMNS = ("", "trial", "loss", "MiB", "tokens", "ms", "tok/s", "method", "bits", "split")
_WIDTHS = (2, 6, 9, 8, 7, 6, 7, 14, 8, 10)
_NUMBERS = range(1, 7)  # columns of figures, aligned to the right


class PlansTable(ScrollView, can_focus=True):
    """Lines are drawn as they scroll into sight, so that ten thousand cost what forty do."""

    DEFAULT_CSS = "PlansTable { scrollbar-size-vertical: 1; overflow-x: hidden; }"
    BINDINGS = [  # noqa: RUF012
        Binding("up", "step(-1)", "Move", tooltip="Along the table"),
        Binding("down", "step(1)", "Move down", show=False),
        Binding("pageup", "step(-20)", "Twenty plans up", show=False),
        Binding("pagedown", "step(20)", "Twenty plans down", show=False),
        Binding("home", "step(-1000000)", "First", show=False),
        Binding("end", "step(1000000)", "Last", show=False),
        Binding("s", "sort(1)", "Sort", tooltip="By the next column"),
        Binding("S", "sort(-1)", "Sort back", show=False),
        Binding("r", "reverse", "Reverse", tooltip="The other way round"),
    ]

    @dataclass
    class Picked(Message):
        """A plan was chosen; its row in the study."""

        row: int

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.view: View | None = None
        self.row: int | None = None
        self.words = ""
        self.column, self.descending = 2, False
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._texts: list[tuple[str, str, str]] = []  # method, bits, split of each plan

    def show(self, view: View, row: int | None) -> None:
        """Draw a view with its cursor."""
        old, self.view = self.view, view
        if old is None or old.study.plans is not view.study.plans:
            found = (dimension.values(view.study) for dimension in (METHOD, BITS, SPLIT))
            self._texts = list(zip(*found, strict=True))
        if view is not old:
            self._arrange()
        if row != self.row:
            self.row = row
            self._follow()
        self.refresh()

    def search(self, words: str) -> None:
        """Keep the plans whose trial, method, bits or split hold every word."""
        self.words = words
        self._arrange()
        self.refresh()

    @property
    def shown(self) -> NDArray[np.int64]:
        """Rows of the study in the order of the table."""
        return self._order

    def _arrange(self) -> None:
        """Filter, then sort."""
        view = self.view
        if view is None:
            return
        rows, words = view.rows, self.words.lower().split()
        if words:
            kept = [row for row in rows.tolist() if all(w in self._line_words(row) for w in words)]
            rows = np.array(kept, np.int64)
        order = np.argsort(self._keys(view, rows), kind="stable")
        self._order = rows[order[::-1] if self.descending else order]
        heading = COLUMNS[self.column] or "front"
        way = "down" if self.descending else "up"
        self.border_title = f" {len(self._order)} plans by {heading}, {way} "
        self.virtual_size = Size(sum(_WIDTHS), len(self._order) + 1)

    def _line_words(self, row: int) -> str:
        assert self.view is not None  # noqa: S101 - asked while there is one
        return " ".join((str(self.view.study.plans.trial[row]), *self._texts[row])).lower()

    def _keys(self, view: View, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        if self.column in _NUMBERS:
            return self._numbers(view)[self.column - 1][rows]
        if self.column:
            return np.array([self._texts[row][self.column - 7] for row in rows.tolist()])
        return ~np.isin(rows, view.front)

    @staticmethod
    def _numbers(view: View) -> tuple[NDArray[np.generic], ...]:
        plans, figures = view.study.plans, view.figures
        return (
            plans.trial, plans.kl[:, 0], figures.prompt_bytes / 2**20, figures.tokens_that_fit,
            1e3 * figures.step_s[:, 0], figures.tokens_per_s[:, 0],
        )  # fmt: skip

    # --- drawing ---------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """The headings stay on top; below them the plans that are in sight."""
        colours, width, ground = colours_of(self.app), self.size.width, self.rich_style
        if self.view is None:
            return Strip.blank(width, ground)
        if y == 0:
            cells = [
                f"{name}{('▾' if self.descending else '▴') if at == self.column else ''}"
                for at, name in enumerate(COLUMNS)
            ]
            return self._strip(cells, ground + Style(color=colours["muted"], bold=True), width)
        place = y - 1 + int(self.scroll_offset.y)
        if place >= len(self._order):
            return Strip.blank(width, ground)
        row = int(self._order[place])
        style = ground + self._style(self.view, row, colours)
        return self._strip(self._cells(self.view, row), style, width)

    def _cells(self, view: View, row: int) -> list[str]:
        chosen, front = row == view.study.chosen, row in view.front
        mark = CHOSEN if chosen else FRONT if front else ""
        numbers: list[float] = [float(column[row]) for column in self._numbers(view)]
        trial, others = numbers[0], numbers[1:]
        figures: list[str] = [short(number) for number in others]
        return [mark, f"{trial:.0f}", *figures, *self._texts[row]]

    def _style(self, view: View, row: int, named: Colours) -> Style:
        if row == self.row:
            return Style(color=named["accent"], bold=True, reverse=self.has_focus)
        if row == view.study.chosen:
            return Style(color=named["success"], bold=True)
        return Style(color=named["primary"] if row in view.front else named["foreground"])

    @staticmethod
    def _strip(cells: list[str], style: Style, width: int) -> Strip:
        padded = [
            f"{cell[: wide - 1]:>{wide - 1}} " if at in _NUMBERS else f"{cell[: wide - 1]:<{wide}}"
            for at, (cell, wide) in enumerate(zip(cells, _WIDTHS, strict=True))
        ]
        return Strip([Segment("".join(padded), style)]).adjust_cell_length(width, style)

    # --- moving ----------------------------------------------------------------------------

    def _place(self) -> int:
        found = np.flatnonzero(self._order == (-1 if self.row is None else self.row))
        return int(found[0]) if len(found) else -1

    def _follow(self) -> None:
        """Scroll so that the cursor is in sight."""
        place = self._place()
        if place >= 0 and self.size.height > 1:
            region = Region(0, place, 1, 2)  # with the headings, which take a line
            self.scroll_to_region(region, animate=False, force=True)

    def action_step(self, by: int) -> None:
        """Another plan, up or down."""
        if len(self._order):
            place = int(np.clip(self._place() + by, 0, len(self._order) - 1))
            self.post_message(self.Picked(int(self._order[place])))

    def action_sort(self, by: int) -> None:
        """By another column."""
        self.column = (self.column + by) % len(COLUMNS)
        self._arrange()
        self._follow()
        self.refresh()

    def action_reverse(self) -> None:
        """The other way round."""
        self.descending = not self.descending
        self._arrange()
        self._follow()
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """On a heading sorts by it; on a line picks it."""
        if event.y == 0:
            ends = np.cumsum(_WIDTHS)
            column = int(np.searchsorted(ends, event.x, side="right"))
            if column == self.column:
                self.action_reverse()
            elif column < len(COLUMNS):
                self.action_sort(column - self.column)
            return
        place = event.y - 1 + int(self.scroll_offset.y)
        if place < len(self._order):
            self.post_message(self.Picked(int(self._order[place])))
