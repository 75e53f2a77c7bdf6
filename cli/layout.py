"""Tables that lose no character where they are wider than the screen.

Where a table is too wide its headings wrap first, then long sentences, then the intervals of its
figures move to a line of their own, then the names wrap between words, and the columns move
together. Where that is not enough either, a row takes several lines, and the headings as many: the
first columns, then the others below them, indented.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

GAP, NARROW_GAP = 2, 1  # spaces between two columns
INDENT = 2  # spaces before columns that stand below others
SENTENCE = 24  # characters that a column of words keeps before figures are broken


@dataclass(frozen=True)
class Grid:
    """Headings and cells of a table, each with its line breaks.

    Args:
        columns: headings.
        rows: cells of each row.
        left: columns of words; the others hold figures and align to the right.
        gap: spaces between two columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int]
    gap: int = GAP

    def widths(self) -> list[int]:
        """Characters that each column takes."""
        return [_width("\n".join(column)) for column in zip(self.columns, *self.rows, strict=True)]

    @property
    def width(self) -> int:
        """Characters that the whole table takes."""
        widths = self.widths()
        return sum(widths) + self.gap * (len(widths) - 1)

    def mapped(self, column: int, change: Callable[[str], str]) -> Grid:
        """The same with another text in each cell of a column."""
        rows = tuple(
            tuple(change(cell) if i == column else cell for i, cell in enumerate(row))
            for row in self.rows
        )
        return replace(self, rows=rows)

    def fitted(self, width: int) -> Grid:
        """The first of the narrower forms that takes at most ``width`` characters."""
        found = self
        for found in _narrower(self, width):
            if found.width <= width:
                break
        return found

    def folded(self, width: int) -> Grid:
        """One column in which every row takes several lines, each with as many cells as fit."""
        parts = [part.fitted(width - INDENT) for part in self._parts(width - INDENT)]
        head, *rows = (
            _folded(lines) for lines in zip(*(part.lines() for part in parts), strict=True)
        )
        return Grid((head,), tuple((row,) for row in rows), frozenset({0}), self.gap)

    def _parts(self, width: int) -> Iterator[Grid]:
        """Neighbouring columns that fit side by side, each time as many as possible."""
        grid = _words_wrapped(_headings_wrapped(self), width, SENTENCE)
        begin = 0
        for end in range(1, len(self.columns) + 1):
            if end == len(self.columns) or grid._of(begin, end + 1).width > width:
                yield grid._of(begin, end)
                begin = end

    def _of(self, begin: int, end: int) -> Grid:
        """Some of the columns."""
        rows = tuple(row[begin:end] for row in self.rows)
        left = frozenset(column - begin for column in self.left if begin <= column < end)
        return Grid(self.columns[begin:end], rows, left, self.gap)

    def lines(self) -> list[str]:
        """Headings and rows as text, cells side by side, each with its own line breaks."""
        widths = self.widths()
        return ["\n".join(self._side_by_side(row, widths)) for row in (self.columns, *self.rows)]

    def _side_by_side(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        cells = [cell.split("\n") for cell in row]
        for words in zip_longest(*cells, fillvalue=""):
            padded = (
                (word + space if column in self.left else space + word)
                for column, (word, size) in enumerate(zip(words, widths, strict=True))
                for space in [" " * (size - _width(word))]
            )
            yield (" " * self.gap).join(padded).rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the form that fits; rich itself is left nothing to cut."""
        grid = self.fitted(options.max_width)
        if grid.width > options.max_width:
            grid = self.folded(options.max_width)
        room = max(options.max_width, grid.width)
        yield from console.render(grid._table(), options.update(width=room, max_width=room))

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        between = (0, self.gap, 0, 0)
        made = Table(box=None, padding=between, pad_edge=False, header_style="underline")
        made.show_header = any(self.columns)
        for index, column in enumerate(self.columns):
            side = "left" if index in self.left else "right"
            made.add_column(Text(column), justify=side, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made


def _narrower(grid: Grid, width: int) -> Iterator[Grid]:
    """Forms of a table from the widest to the narrowest."""
    yield grid
    grid = _headings_wrapped(grid)
    yield grid
    grid = _words_wrapped(grid, width, SENTENCE)
    yield grid
    for column in set(range(len(grid.columns))) - grid.left:
        grid = grid.mapped(column, _interval_below)
    grid = _headings_wrapped(grid)
    yield grid
    grid = _words_wrapped(grid, width, 1)
    yield grid
    yield replace(grid, gap=NARROW_GAP)


def _folded(parts: Sequence[str]) -> str:
    """Texts below each other, all but the first indented."""
    return "\n".join([parts[0], *(textwrap.indent(part, " " * INDENT) for part in parts[1:])])


def _headings_wrapped(grid: Grid) -> Grid:
    """Headings no wider than the cells below them, as far as their words allow."""
    columns = [
        _wrapped(heading, _width("\n".join(row[i] for row in grid.rows)))
        for i, heading in enumerate(grid.columns)
    ]
    return replace(grid, columns=tuple(columns))


def _words_wrapped(grid: Grid, width: int, least: int) -> Grid:
    """Columns of words made narrower, the widest first, but not below ``least`` characters."""
    widest_first = sorted(grid.left, key=lambda column: -grid.widths()[column])
    for column in widest_first:
        excess = grid.width - width
        if excess <= 0:
            break
        size = max(grid.widths()[column] - excess, least)
        grid = grid.mapped(column, lambda cell, size=size: _wrapped(cell, size))  # type: ignore[misc]
    return grid


def _wrapped(text: str, width: int) -> str:
    """Broken between words; a word that is longer than ``width`` stays whole."""
    longest = max(map(len, text.split()), default=1)
    lines = textwrap.wrap(text, max(width, longest), break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _interval_below(cell: str) -> str:
    """``0.0146 [0.0074, 0.029]`` with its interval on a second line."""
    return re.sub(r" (?=\[)", "\n", cell, count=1)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")), default=0)
