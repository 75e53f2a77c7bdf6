"""Widgets that are lines of text: of another content only those that look different are painted."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

from rich.segment import Segment
from rich.text import Text
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

C = TypeVar("C")


class Lines(Widget, Generic[C]):
    """Lays its content out as lines once, and paints a line again only where it has changed.

    Textual's own ``Static`` paints all of its lines, and a cursor that moves changes a few.
    """

    DEFAULT_CSS = "Lines { height: auto; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.content: C | None = None
        self._laid: list[Text] = []
        self._laid_for: tuple[object, object] = (None, None)  # content; width and theme

    @abstractmethod
    def lay(self, content: C, width: int) -> list[Text]:
        """The content as lines of at most ``width`` cells."""

    def draw(self, content: C) -> None:
        """Show another content; the screen is laid out anew only for another number of lines."""
        before, width, self.content = self._laid, self.size.width, content
        after = self.lines(width)
        if len(before) != len(after):
            self.refresh(layout=True)
            return
        pairs = enumerate(zip(before, after, strict=True))
        if changed := [Region(0, y, width, 1) for y, pair in pairs if differ(*pair)]:
            self.refresh(*changed)

    def lines(self, width: int) -> list[Text]:
        """The lines at a width, laid out where they are not yet."""
        asked = (width, self.app.theme)
        if self.content is None:
            return []
        if self._laid_for[0] is not self.content or self._laid_for[1] != asked:
            self._laid_for, self._laid = (self.content, asked), self.lay(self.content, width)
        return self._laid

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Lines at the width to come: the widget's own is still that of the layout before."""
        return len(self.lines(width))

    def render(self) -> Text:
        """All lines as one text, which is what a selection with the mouse copies."""
        return Text("\n").join(self.lines(self.size.width))

    def render_line(self, y: int) -> Strip:
        """One line, with the ground that the widget stands on."""
        lines, ground = self.lines(self.size.width), self.rich_style
        if y >= len(lines):
            return Strip.blank(self.size.width, ground)
        parts = lines[y].render(self.app.console)
        strip = Strip([Segment(part.text, ground + (part.style or ground)) for part in parts])
        return strip.adjust_cell_length(self.size.width, ground)


def differ(one: Text, other: Text) -> bool:
    """Whether two lines look different: in their words or in their colours."""
    return one != other or one.style != other.style
