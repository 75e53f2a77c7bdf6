"""What the marks of the plot mean; only those that are there."""

from __future__ import annotations

from rich.text import Text
from textual.geometry import Size
from textual.widget import Widget

from kvtune.tui.palette import (
    CHOSEN,
    FRONT,
    GROUPS,
    OTHER,
    SELECTED,
    colours_of,
    mark_of,
    words_of,
)
from kvtune.tuner.explore.view import View


class Legend(Widget):
    """As many lines as it takes; a mark and its words stay together."""

    DEFAULT_CSS = "Legend { height: auto; }"

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.view: View | None = None

    def show(self, view: View) -> None:
        """Explain this view."""
        if view is not self.view:
            self.view = view
            self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Lines at the width to come: the widget's own is still that of the layout before."""
        return len(self._lines(width))

    def render(self) -> Text:
        """Marks with their words, and the filter."""
        return Text("\n").join(self._lines(self.size.width))

    def _lines(self, width: int) -> list[Text]:
        if self.view is None:
            return []
        colours, lines, used = colours_of(self.app), [Text()], 0
        for mark, colour, words in _parts(self.view):
            length = len(mark) + len(words) + 3
            if used and used + length > width + 2:
                lines.append(Text())
                used = 0
            lines[-1].append(mark, colours[colour]).append(f" {words}  ")
            used += length
        return lines


def _parts(view: View) -> list[tuple[str, str, str]]:
    """Mark, colour, words."""
    chosen = "chosen" if view.study.outcome else "best so far"
    baselines = [(mark_of(b.family), "error", words_of(b.family)) for b, *_ in view.baselines()]
    lines = [("─" if line.axis is view.y else "│", "muted", line.words) for line in view.lines]
    shown = [("shown:", "warning", view.filter.words)] if view.filter.words else []
    groups = [
        (FRONT, GROUPS[min(number, len(GROUPS) - 1)], name)
        for number, name in enumerate(view.groups)
    ]
    return [
        *shown,
        *groups,
        (FRONT, "muted" if groups else "primary", "front"),
        (OTHER, "muted", "other"),
        (CHOSEN, "success", chosen),
        (SELECTED, "accent", "here"),
        *lines,
        *baselines,
    ]
