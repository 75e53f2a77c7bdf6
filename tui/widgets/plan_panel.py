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
from kvtune.tuner.explore.measured import Measured
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
        """Its study."""
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
        self.query_one("#figures", Static).update(figures_table(selected))
        parts = MemoryParts(figures.budgets[context], peak)
        self.query_one(MemoryBar).show(parts)
        self.query_one("#heads-heading", Static).update(f"Heads: {shade} by layer and KV head")
        self.query_one(HeatMap).show(HeadMap.of(policy, context), shade)
        self.query_one("#why", Static).update("\n".join(why(selected.study, plan)))


def title(selected: Selected) -> str:
    """Which plan it is."""
    words = f"Plan of trial {selected.plan.trial}"
    if selected.row != selected.study.chosen:
        return words
    return f"{words} ★ " + ("chosen" if selected.study.outcome else "best so far")


def figures_table(selected: Selected) -> Table:
    """Predicted beside measured, each with interval and tier."""
    measured = selected.study.live(selected.plan)
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=measured is not None)
    table.add_column("", no_wrap=True)
    table.add_column("predicted" if measured else "")
    if measured:
        table.add_column("measured")
    for label, predicted, live in rows(selected, measured):
        table.add_row(Text(label), *([predicted, live] if measured else [predicted]))
    return table


def rows(selected: Selected, measured: Measured | None) -> list[tuple[str, str, str]]:
    """Label, predicted, measured."""
    plan, figures, row = selected.plan, selected.view.figures, selected.row
    facts, size = selected.study.facts, int(figures.prompt_bytes[row])
    found = [
        ("KL nats", figure(plan.kl), figure(measured.kl) if measured else ""),
        *_held_out(selected),
        (
            "prompt",
            f"{format_bytes(size)}, {percent(float(figures.share[row]))} of bf16",
            format_bytes(measured.prompt_bytes) if measured else "",
        ),
        (
            "at once",
            f"{count(figures.sequences[row])} x {count(figures.context_tokens[row])} tokens", "",
        ),
        ("would fit", f"{count(figures.tokens_that_fit[row])} tokens", ""),
        ("a token", figure(figures.estimate("step_s", row)), ""),
        ("tokens/s", figure(figures.estimate("tokens_per_s", row)), ""),
        ("quality", facts.quality, "own model" if measured else ""),
    ]  # fmt: skip
    return found + (_live_rows(measured) if measured else [])


def _held_out(selected: Selected) -> list[tuple[str, str, str]]:
    """The chosen plan's loss on samples that no choice was made on."""
    outcome = selected.study.outcome
    if outcome is None or selected.row != selected.study.chosen:
        return []
    return [("held out", figure(outcome.predicted), "")]


def _live_rows(measured: Measured) -> list[tuple[str, str, str]]:
    change = measured.perplexity_change
    return [
        ("perplexity", "", "-" if change is None else f"{100 * change.value:+.2g} %"),
        ("retrieval", "", accuracy(measured.retrieval_accuracy)),
        ("full cache", "", accuracy(measured.full_cache_accuracy)),
    ]
