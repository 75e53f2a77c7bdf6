"""The plot's canvas: it keeps a ground to draw the cursor on, and repaints changed lines only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual_hires_canvas import Canvas

_Lines = list[tuple[list[str], list[str]]]  # characters and styles of each line


class PlotCanvas(Canvas):
    """A canvas that costs what changes on it, not what is on it.

    All its segments have a style: Textual's filter for NO_COLOR needs one.
    """

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name
        self._shown: _Lines = []
        self._ground: _Lines = []
        super().__init__(1, 1, id=id)

    def render_line(self, y: int) -> Strip:
        """One line, as drawn."""
        strip = super().render_line(y)
        styled = [Segment(s.text, s.style or Style.null(), s.control) for s in strip]
        return Strip(styled, strip.cell_length)

    def keep_ground(self) -> None:
        """What is drawn now is the ground from here on."""
        self._ground = self._copy()

    def restore_ground(self) -> None:
        """As it was when the ground was kept."""
        for y, (characters, styles) in enumerate(self._ground):
            self._buffer[y][:], self._styles[y][:] = characters, styles

    @contextmanager
    def batch_refresh(self) -> Iterator[None]:
        """Draw within this; at its end the lines that have changed are repainted."""
        self._refreshes_pending += 1
        try:
            yield
        finally:
            self._refreshes_pending -= 1
            if not self._refreshes_pending:
                self._repaint()

    def _repaint(self) -> None:
        before, self._shown = self._shown, self._copy()
        width = self._canvas_size.width
        if [len(line) for line, _ in before] != [width] * len(self._shown):
            self.refresh()
            return
        pairs = enumerate(zip(self._shown, before, strict=True))
        changed = [Region(0, y, width, 1) for y, (now, then) in pairs if now != then]
        if changed:
            self.refresh(*changed)

    def _copy(self) -> _Lines:
        rows = zip(self._buffer, self._styles, strict=True)
        return [(characters.copy(), styles.copy()) for characters, styles in rows]
