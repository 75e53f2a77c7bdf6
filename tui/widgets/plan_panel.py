"""The selected plan: figures with their tiers, memory, heads, and why it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.geometry import Region
from textual.widgets import Static

from kvtune.common.units import format_bytes
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.tui.widgets.heat_map import HeatMap, Shade
from kvtune.tui.widgets.lines import Lines
from kvtune.tui.widgets.memory_bar import MemoryBar, MemoryParts
from kvtune.tuner.explore.compare import HeadMap
from kvtune.tuner.explore.plans import Plan
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.why import why


@dataclass(frozen=True)
class Selected:
    """The plan under the cursor, in its view."""

    view: View
    row: int

    @property
    def study(self) -> Study:
        """The study that the plan is of."""
        return self.view.study

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.study.plans[self.row]


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


def title(selected: Selected) -> str:
    """Which plan it is."""
    words = f"Plan of trial {selected.plan.trial}"
    if selected.row == selected.study.chosen:
        words += " ★ " + ("chosen" if selected.study.outcome else "best so far")
    return f"{words}, what if" if selected.view.is_what_if else words


def quality_rows(selected: Selected) -> list[tuple[str, str]]:
    """What it loses: on selection samples, on held-out ones, and live."""
    study, plan = selected.study, selected.plan
    rows = [
        ("loss, selection", figure(plan.kl)),
        ("loss, held out", figure(plan.held_out)),
    ]
    if (live := study.live(plan)) is not None:
        rows.append(("loss, live", figure(live.kl)))
        if live.perplexity_change is not None:
            rows.append(("perplexity", f"{100 * live.perplexity_change.value:+.2g} % live"))
        if live.retrieval_accuracy is not None:
            full = accuracy(live.full_cache_accuracy)
            rows.append(
                ("retrieval", f"{accuracy(live.retrieval_accuracy)} live, full cache {full}")
            )
    return [*rows, ("quality", study.facts.quality)]


def cost_rows(selected: Selected) -> list[tuple[str, str]]:
    """What it takes at the setting of the view."""
    figures, row = selected.view.figures, selected.row
    size, share = int(figures.prompt_bytes[row]), float(figures.share[row])
    at_once = f"{count(figures.sequences[row])} x {count(figures.context_tokens[row])} tokens"
    return [
        ("one prompt", f"{format_bytes(size)}, {percent(share)} of bf16"),
        ("prompts at once", at_once),
        ("room for", f"{count(figures.tokens_that_fit[row])} tokens"),
        ("time per token", figure(figures.estimate("step_s", row))),
        ("tokens/s", figure(figures.estimate("tokens_per_s", row))),
    ]
