"""The selected plan: figures with their tiers, memory, heads, and why it was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from kvtune.common.units import format_bytes
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.tui.widgets.heat_map import HeatMap, Shade
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

    _rows, _shade = 0, ""

    def compose(self) -> ComposeResult:
        """Headline, figures, memory, heads, reasons."""
        yield Static(id="figures")
        yield Static("Memory, GiB", classes="heading")
        yield MemoryBar(id="memory-bar")
        yield Static(id="heads-heading", classes="heading")
        yield HeatMap(id="heads")
        yield Static("Why", classes="heading")
        yield Static(id="why", markup=False)

    def show(self, selected: Selected, shade: Shade) -> None:
        """Draw a plan."""
        plan, figures, row = selected.plan, selected.view.figures, selected.row
        context = int(figures.context_tokens[row])
        policy = selected.study.policy(plan)
        peak = figures.estimate("memory", row)
        self.border_title = title(selected)
        table = figures_table(selected)
        facts = self.query_one("#figures", Static)
        facts.update(table, layout=table.row_count != self._rows)
        self._rows = table.row_count
        parts = MemoryParts(figures.budget(row), peak)
        self.query_one(MemoryBar).show(parts)
        heading = f"Heads: {shade} by layer and KV head"
        if shade != self._shade:
            self.query_one("#heads-heading", Static).update(heading, layout=False)
            self._shade = shade
        self.query_one(HeatMap).show(HeadMap.of(policy, context), shade)
        self._tell("\n".join(why(selected.study, plan)))

    def _tell(self, reasons: str) -> None:
        """Reasons; a new layout only where they take more or fewer lines."""
        words = self.query_one("#why", Static)
        lines = len(Text(reasons).wrap(self.app.console, max(words.size.width, 1)))
        words.update(reasons, layout=lines != words.size.height)


def title(selected: Selected) -> str:
    """Which plan it is."""
    words = f"Plan of trial {selected.plan.trial}"
    if selected.row == selected.study.chosen:
        words += " ★ " + ("chosen" if selected.study.outcome else "best so far")
    return f"{words}, what if" if selected.view.is_what_if else words


def figures_table(selected: Selected) -> Table:
    """Predicted and measured figures, each with interval and tier."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, words in (*quality_rows(selected), *cost_rows(selected)):
        table.add_row(Text(label), Text(words))
    return table


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
