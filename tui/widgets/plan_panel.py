"""The selected plan: figures with their tiers, memory, heads, and why it was chosen."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.geometry import Region
from textual.widgets import Static

from kvtune.tui.memory_parts import MemoryParts
from kvtune.tui.selected import Selected, cost_rows, quality_rows, title
from kvtune.tui.widgets.heat_map import HeatMap, Shade
from kvtune.tui.widgets.lines import Lines
from kvtune.tui.widgets.memory_bar import MemoryBar
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.why import why


class PlanPanel(VerticalScroll):
    """Everything about one plan; scrolls where it is higher than the screen."""

    DEFAULT_CSS = """
    PlanPanel { padding: 0 1; }
    PlanPanel > .heading { margin-top: 1; text-style: bold; color: $text-primary; height: 1; }
    PlanPanel > #why { color: $text-muted; }
    """

    _shade, _headline = "", ""

    def compose(self) -> ComposeResult:
        """Headline, figures, memory, heads, reasons."""
        yield FigureLines(id="figures")
        yield Static("Memory, GiB", classes="heading")
        yield MemoryBar(id="memory-bar")
        yield Static(id="heads-heading", classes="heading")
        yield HeatMap(id="heads")
        yield Static("Why", classes="heading")
        yield Reasons(id="why")

    def show(self, selected: Selected, shade: Shade) -> None:
        """Draw a plan."""
        plan, figures, row = selected.plan, selected.view.figures, selected.row
        context = int(figures.context_tokens[row])
        policy = selected.study.policy(plan)
        peak = figures.estimate("memory", row)
        self._write_title(title(selected))
        self.query_one(FigureLines).draw((*quality_rows(selected), *cost_rows(selected)))
        self.query_one(MemoryBar).draw(MemoryParts(figures.budget(row), peak))
        heading = f"Heads: {shade} by layer and KV head"
        if shade != self._shade:
            self.query_one("#heads-heading", Static).update(heading, layout=False)
            self._shade = shade
        self.query_one(HeatMap).show(HeadMap.of(policy, context), shade)
        self.query_one(Reasons).draw(why(selected.study, plan))

    def _write_title(self, words: str) -> None:
        """Write into the border; only its line is painted, where Textual paints the whole panel."""
        if words != self._headline:
            self._headline, self._border_title = words, Content(words)
            left, top = self.content_offset
            self.refresh(Region(-left, -top, self.outer_size.width, 1))


class FigureLines(Lines[tuple[tuple[str, str], ...]]):
    """Labels and figures in two columns."""

    def lay(self, content: tuple[tuple[str, str], ...], width: int) -> list[Text]:
        """A line for each figure, or more where it is long."""
        wide, lines = max(len(label) for label, _ in content) + 1, list[Text]()
        for label, words in content:
            parts = Text(words).wrap(self.app.console, max(width - wide, 1))
            for number, part in enumerate(parts):
                lines.append(Text(f"{'' if number else label:<{wide}}{part}", end=""))
        return lines


class Reasons(Lines[list[str]]):
    """Sentences; as many lines as the most so far, so that the screen is not laid out for each."""

    _most: tuple[int, int] = (0, 0)  # width, and lines at it

    def lay(self, content: list[str], width: int) -> list[Text]:
        """Each sentence on lines of its own."""
        found = Text("\n".join(content), end="").wrap(self.app.console, max(width, 1))
        most = max(len(found), self._most[1] if self._most[0] == width else 0)
        self._most = (width, most)
        return [*found, *(Text("", end="") for _ in range(most - len(found)))]
