"""Two plans, or a plan and a baseline: figures, tasks, heads."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Label, Select, Static

from kvtune.common.estimate import Estimate
from kvtune.common.units import format_bytes
from kvtune.common.words import count, figure, percent
from kvtune.tui.selected import Selected
from kvtune.tui.widgets.heat_map import SHADES, HeatMap, Shade
from kvtune.tui.widgets.ratio_map import RatioMap
from kvtune.tuner.explore.compare import (
    HeadMap,
    Side,
    baseline_side,
    common_kinds,
    difference,
    plan_side,
)


class CompareScreen(Screen[None]):
    """The selected plan on the left; on the right what one chooses.

    Args:
        selected: the plan.
        marked: row of the marked plan, or None.
    """

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        Binding("escape", "app.pop_screen", "Back"),
        Binding("h", "shade", "Heads", tooltip="Heads by budget, bits or method"),
        Binding("n", "next", "Next", tooltip="Compare with the next one"),
    ]

    def __init__(self, selected: Selected, marked: int | None) -> None:
        super().__init__()
        self.selected, self.shade = selected, SHADES[0]
        self.left = plan_side(selected.study, selected.plan, selected.view.setting)
        self.others = self._others(marked)

    def _others(self, marked: int | None) -> list[Side]:
        """Marked, chosen, baselines; never the plan itself."""
        study, plan, setting = (
            self.selected.study,
            self.selected.plan,
            self.selected.view.setting,
        )
        rows = [row for row in dict.fromkeys((marked, study.chosen)) if row is not None]
        plans = [study.plans[row] for row in rows if row != self.selected.row]
        found = [plan_side(study, other, setting) for other in plans]
        for baseline in study.outcome.baselines[1:] if study.outcome else ():
            found.append(baseline_side(study, baseline, plan, setting))
        return found

    def compose(self) -> ComposeResult:
        """Sides, figures, tasks, heads."""
        with Horizontal(id="sides"):
            yield Label(f"◆ {self.left.name}  beside")
            names = [(side.name, index) for index, side in enumerate(self.others)]
            if names:
                yield Select(names, value=0, allow_blank=False, id="other")
        with VerticalScroll(id="compare-body"):
            yield Static(id="figures")
            yield Static("By kind of text, held-out samples, KL in nats/token", classes="heading")
            yield Static(id="kinds")
            yield Static(id="heads-heading", classes="heading")
            with Horizontal(id="maps"):
                with Vertical():
                    yield Static(self.left.name, markup=False)
                    yield HeatMap(id="left-map")
                with Vertical():
                    yield Static(id="right-name", markup=False)
                    yield HeatMap(id="right-map")
                with Vertical(id="ratio-box"):
                    yield Static("bytes, left over right")
                    yield RatioMap(id="ratio")
        yield Footer()

    def on_mount(self) -> None:
        """Draw the first pair."""
        self.draw()

    @property
    def right(self) -> Side | None:
        """What the plan stands beside."""
        if not self.others:
            return None
        value = self.query_one("#other", Select).value
        return self.others[value] if isinstance(value, int) else None

    @on(Select.Changed, "#other")
    def draw(self) -> None:
        """Draw the pair."""
        right = self.right
        if right is None:
            self.query_one("#figures", Static).update(
                "There is nothing to compare with yet: mark another plan with m, "
                "or wait for the search's baselines."
            )
            return
        self.query_one("#figures", Static).update(figures_table(self.left, right))
        self.query_one("#kinds", Static).update(kinds_table(self.left, right))
        self.query_one("#right-name", Static).update(right.name)
        self._draw_heads(right, self.shade)

    def _draw_heads(self, right: Side, shade: Shade) -> None:
        context = self.selected.view.setting.context_tokens or self.selected.plan.context_tokens
        assert self.left.policy is not None  # noqa: S101 - plans have one
        words, ratio = f"Heads, {shade} by layer (across) and KV head (down)", None
        if right.policy is not None:
            head_dim = self.selected.study.facts.shape.head_dim
            apart = difference(self.left.policy, right.policy, context, head_dim)
            words += (
                f": {apart.heads} of {apart.of} differ, {apart.more} get more bytes here, "
                f"{apart.fewer} fewer"
            )
            ratio = apart.ratio
        self.query_one("#heads-heading", Static).update(words)
        self.query_one("#left-map", HeatMap).show(HeadMap.of(self.left.policy, context), shade)
        theirs = None if right.policy is None else HeadMap.of(right.policy, context)
        self.query_one("#right-map", HeatMap).show(theirs, shade)
        self.query_one("#ratio", RatioMap).show(ratio)
        self.query_one("#ratio-box").display = ratio is not None

    def action_shade(self) -> None:
        """Budget, bits, method."""
        self.shade = SHADES[(SHADES.index(self.shade) + 1) % len(SHADES)]
        self.draw()

    def action_next(self) -> None:
        """The next one to compare with."""
        if self.others:
            chooser = self.query_one("#other", Select)
            now = chooser.value if isinstance(chooser.value, int) else 0
            chooser.value = (now + 1) % len(self.others)


def figures_table(left: Side, right: Side) -> Table:
    """Both sides with intervals and tiers, and the ratio of the values."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="underline")
    for heading, justify in (("", "left"), (left.name, "left"), (right.name, "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("left / right", justify="right")
    for samples in ("selection", "held_out", "live"):
        pair = (getattr(left, samples), getattr(right, samples))
        if any(pair):
            table.add_row(f"KL, {samples.replace('_', ' ')}", *_estimates(*pair))
    sizes = (left.prompt_bytes, right.prompt_bytes)
    table.add_row("prompt", *map(format_bytes, sizes), ratio(*sizes))
    for label, column in (("peak", "memory"), ("a token", "step_s"), ("tokens/s", "tokens_per_s")):
        table.add_row(Text(label), *_pair(left, right, column))
    table.add_row("would fit", *(_fits(side) for side in (left, right)), "")
    table.add_row("of bf16", *(_share(side) for side in (left, right)), "")
    return table


def _pair(left: Side, right: Side, column: str) -> tuple[str, str, str]:
    return _estimates(
        *(side.figures.estimate(column, 0) if side.figures else None for side in (left, right))
    )


def _estimates(ours: Estimate | None, theirs: Estimate | None) -> tuple[str, str, str]:
    quotient = ratio(ours.value, theirs.value) if ours and theirs else "-"
    return figure(ours), figure(theirs), quotient


def _fits(side: Side) -> str:
    return f"{count(side.figures.tokens_that_fit[0])} tokens" if side.figures else "-"


def _share(side: Side) -> str:
    return percent(float(side.figures.share[0])) if side.figures else "-"


def kinds_table(left: Side, right: Side) -> Table | str:
    """Task by task on held-out samples: predicted, and measured where a side ran live."""
    kinds, live = common_kinds((left, right)), {**left.live_by_kind, **right.live_by_kind}
    if not (kinds or live):
        return "Losses by kind of text are not known of this baseline."
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="underline")
    for heading in ("", left.name, right.name, "left / right"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind in kinds:
        ours, theirs = left.by_kind[kind], right.by_kind[kind]
        table.add_row(kind, f"{ours:.3g}", f"{theirs:.3g}", ratio(ours, theirs))
    for kind in sorted(live):
        pair = (left.live_by_kind.get(kind), right.live_by_kind.get(kind))
        table.add_row(f"{kind}, live", *_estimates(*pair))
    return table


def ratio(ours: float, theirs: float) -> str:
    """``0.44 x``; ``-`` by nothing."""
    return f"{ours / theirs:.2f} x" if theirs else "-"
