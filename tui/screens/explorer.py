"""The main screen: the front, the selected plan, and what if."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Input, Static

from kvtune.common.errors import KvtuneError
from kvtune.tui.screens.compare import CompareScreen
from kvtune.tui.screens.export import ExportScreen
from kvtune.tui.screens.filters import FilterScreen
from kvtune.tui.screens.help import HelpScreen
from kvtune.tui.screens.validate import ValidateScreen
from kvtune.tui.selected import Selected
from kvtune.tui.widgets.heat_map import SHADES, Shade
from kvtune.tui.widgets.keys import Keys
from kvtune.tui.widgets.legend import Legend
from kvtune.tui.widgets.notice import Notice, too_small
from kvtune.tui.widgets.plan_panel import PlanPanel
from kvtune.tui.widgets.plans_table import PlansTable
from kvtune.tui.widgets.plot import FrontPlot
from kvtune.tui.widgets.status import status
from kvtune.tui.widgets.what_if import WhatIf
from kvtune.tuner.explore.axes import AXES, Axis, Filter
from kvtune.tuner.explore.dimensions import DIMENSIONS
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures_of


class ExplorerScreen(Screen[None]):
    """Holds the cursor; draws snapshots and views, computes nothing of its own."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide"), (170, "-huge")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        Binding("question_mark", "help", "Help", key_display="?", tooltip="This page"),
        Binding("x", "axis('x')", "Axes", tooltip="Another figure across"),
        Binding("y", "axis('y')", "Upward", tooltip="Another figure upward", show=False),
        Binding("k", "colour", "Colour", tooltip="Plans by method, bits, split or context"),
        Binding("p", "plans", "Plans", tooltip="The table of plans, or the plot"),
        Binding(
            "slash",
            "search",
            "Search",
            key_display="/",
            show=False,
            tooltip="Plans whose trial, method, bits or split hold these words",
        ),
        Binding("h", "shade", "Heads", tooltip="Heads by budget, bits or method"),
        Binding("w", "what_if", "What if", tooltip="Other contexts, batches, cards and limits"),
        Binding("f", "filter", "Filter", tooltip="Which plans are shown"),
        Binding("m", "mark", "Mark", tooltip="Mark the plan, to compare others with"),
        Binding("c", "compare", "Compare", tooltip="With the marked plan or a baseline"),
        Binding("e", "export", "Export", tooltip="To a policy file or a serving stack"),
        Binding("v", "validate", "Validate", tooltip="Run the model with this plan"),
        Binding(
            "escape",
            "leave_what_if",
            "As searched",
            show=False,
            tooltip="Leave what if: everything as it was searched",
        ),
        Binding("g", "go_chosen", "Chosen", tooltip="Back to the chosen plan", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.view: View | None = None
        self.row: int | None = None
        self.marked: int | None = None
        self.shade: Shade = "budget"
        self.error: KvtuneError | None = None

    def compose(self) -> ComposeResult:
        """Status, a notice and keys; the rest when there is something to draw."""
        yield Static(id="status", markup=False)
        yield Notice(id="notice")
        yield Keys()

    async def _mount_body(self) -> None:
        """Plot, legend and plan; the sliders of what if come when they are first asked for."""
        left = Vertical(
            FrontPlot(id="plot-front"),
            Input(id="search", placeholder="words of plans: snapkv 4 bits", compact=True),
            PlansTable(id="plans-table"),
            Legend(id="legend"),
            id="left",
        )
        plan = PlanPanel(id="plan", can_focus=True)
        await self.mount(Horizontal(left, plan, id="body"), before="#notice")

    def on_mount(self) -> None:
        """Draw again in the colours of another theme."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw_cursor())

    # --- snapshots -------------------------------------------------------------------------

    async def arrived(self, study: Study) -> None:
        """Draw a snapshot; the cursor stays on its plan."""
        was_lost, self.error = self.error, None
        if self.view is None:
            if not self.query("#body"):
                await self._mount_body()
            self._draw(study, Setting.asked(study.facts))
            self.query_one(FrontPlot).focus()
        elif was_lost or self._is_new(study):
            self._keep_place(study)
        self._show_state()

    def _is_new(self, study: Study) -> bool:
        assert self.view is not None  # noqa: S101 - asked of the second snapshot on
        old = self.view.study
        seen = (old.plans is study.plans, old.outcome is study.outcome, old.state == study.state)
        return not all(seen) or old.measured != study.measured

    def _keep_place(self, study: Study) -> None:
        """The same plan by trial; another study begins anew."""
        assert self.view is not None  # noqa: S101 - asked of the second snapshot on
        old, row = self.view.study, self.row
        followed = row is None or (row == old.chosen and row == self.view.start)
        if old.facts.study != study.facts.study:
            self.row = self.marked = None
            if panel := self._what_if:
                panel.offer(study.facts)
            self._draw(study, Setting.asked(study.facts))
            return
        if followed:
            self.row = None
        self._draw(study, self.view.setting)

    def lost(self, error: KvtuneError) -> None:
        """The storage cannot be read now."""
        self.error = error
        self._show_state()

    def _draw(self, study: Study, setting: Setting) -> None:
        """A new view of a snapshot at a setting; an impossible setting keeps the last figures."""
        panel = self._what_if
        try:
            figures = figures_of(study, setting)
        except KvtuneError as error:
            if panel is None:
                self.error = error
            else:
                panel.tell(f"{error.message}; shown is the last setting that fits")
            return
        if panel is not None:
            panel.tell("")
        if self.view is None:
            self.view = View(study, figures, setting)
        else:
            self.view = replace(self.view, study=study, figures=figures, setting=setting)
        self._refresh_view()

    def _refresh_view(self) -> None:
        """Draw the view as it is, with the cursor on a plan that is shown."""
        view = self.view
        if view is None:
            return
        if self.row is None or self.row not in view.rows:
            self.row = view.start
        self._show_state()
        self._draw_cursor()

    def _draw_cursor(self) -> None:
        view = self.view
        if view is None or not len(view.study.plans):
            return
        self.query_one(FrontPlot).show(view, self.row, self.marked)
        self.query_one(Legend).show(view)
        if self.shows_table:
            self.query_one(PlansTable).show(view, self.row)
        if self.row is not None:
            self.query_one(PlanPanel).show(Selected(view, self.row), self.shade)

    def _show_state(self) -> None:
        """Status line, and a notice where there is nothing to draw."""
        study = self.view.study if self.view else None
        self.query_one("#status", Static).update(status(self.view, self.error, self.size.width))
        notice = self.query_one(Notice)
        words = too_small(self.size) or notice.words_for(study, self.view, self.error)
        notice.update(words or "")
        notice.display = bool(words)
        self.query("#body").set(display=not words)

    @on(events.Resize)
    def fit(self) -> None:
        """Say so where the terminal is too small; fill the table where there is room for it."""
        self._show_state()
        if self.view is not None:
            self.call_after_refresh(self._draw_cursor)

    # --- moving ----------------------------------------------------------------------------

    @on(FrontPlot.Picked)
    @on(PlansTable.Picked)
    def move_cursor(self, event: FrontPlot.Picked | PlansTable.Picked) -> None:
        """Show the plan that was picked in the plot or the table."""
        if event.row != self.row:
            self.row = event.row
            self._draw_cursor()

    @on(WhatIf.Changed)
    def try_setting(self, event: WhatIf.Changed) -> None:
        """Memory and time elsewhere."""
        if self.view is not None:
            self._draw(self.view.study, event.setting)

    def action_go_chosen(self) -> None:
        """Back to the chosen plan."""
        if self.view is not None and self.view.start is not None:
            self.row = self.view.start
            self._draw_cursor()

    def action_axis(self, which: str) -> None:
        """The next figure that the other axis does not show."""
        if self.view is None:
            return
        here, other = (self.view.x, self.view.y) if which == "x" else (self.view.y, self.view.x)
        found = AXES[(AXES.index(here) + 1) % len(AXES)]
        if found is other:
            found = AXES[(AXES.index(found) + 1) % len(AXES)]
        self.choose_axis(which, found)

    def choose_axis(self, which: str, axis: Axis) -> None:
        """Show a figure on an axis; one that the other axis shows changes places with it."""
        if self.view is None:
            return
        x, y = (axis, self.view.y) if which == "x" else (self.view.x, axis)
        if x is y:
            x, y = self.view.y, self.view.x
        self.view = replace(self.view, x=x, y=y)
        self._refresh_view()

    def action_colour(self) -> None:
        """Plans coloured by the next of their properties, or by none."""
        if self.view is not None:
            known = (None, *DIMENSIONS)
            after = known[(known.index(self.view.colour) + 1) % len(known)]
            self.view = replace(self.view, colour=after)
            self._draw_cursor()

    @property
    def shows_table(self) -> bool:
        """Whether the table of plans is on screen."""
        return self.has_class("-plans") or self.has_class("-huge")

    def action_plans(self) -> None:
        """The table in the place of the plot, where both have no room; else the way to it."""
        table, plot = self.query_one(PlansTable), self.query_one(FrontPlot)
        away = table.has_focus
        self.set_class(not away and not self.has_class("-huge"), "-plans")
        (plot if away else table).focus()
        self._draw_cursor()

    def action_search(self) -> None:
        """Write words that plans must hold."""
        self.set_class(not self.has_class("-huge"), "-plans")
        self.add_class("-search")
        self._draw_cursor()
        self.query_one("#search", Input).focus()

    @on(Input.Changed, "#search")
    def search(self, event: Input.Changed) -> None:
        """As the words are written."""
        self.query_one(PlansTable).search(event.value)

    @on(Input.Submitted, "#search")
    def leave_search(self) -> None:
        """To what was found."""
        self.query_one(PlansTable).focus()

    def action_shade(self) -> None:
        """Budget, bits, method."""
        self.shade = SHADES[(SHADES.index(self.shade) + 1) % len(SHADES)]
        self._draw_cursor()

    def action_mark(self) -> None:
        """Mark this plan, or take its mark away."""
        self.marked = None if self.marked == self.row else self.row
        self._draw_cursor()

    @property
    def _what_if(self) -> WhatIf | None:
        """The sliders, once they were asked for."""
        return self.query_one_optional(WhatIf)

    async def action_what_if(self) -> None:
        """Show the sliders, or put them away."""
        if self.view is None:
            return
        panel = self._what_if
        if panel is None:
            panel = WhatIf(id="what-if")
            await self.query_one("#left").mount(panel)
            panel.border_title = "What if"
            panel.offer(self.view.study.facts)
        self.toggle_class("-what-if")
        (panel.context if self.has_class("-what-if") else self.query_one(FrontPlot)).focus()

    def action_leave_what_if(self) -> None:
        """Leave a search; else put every slider back where the search of plans stood."""
        if self.view is None:
            return
        if self.has_class("-search"):
            self.remove_class("-search")
            self.query_one("#search", Input).value = ""
            self.query_one(PlansTable).focus()
            return
        if panel := self._what_if:
            panel.offer(self.view.study.facts)
        self.remove_class("-what-if")
        if self.view.is_what_if:
            self._draw(self.view.study, Setting.asked(self.view.study.facts))
        self.query_one(FrontPlot).focus()

    # --- other screens ---------------------------------------------------------------------

    @property
    def selected(self) -> Selected | None:
        """The plan under the cursor."""
        if self.view is None or self.row is None:
            return None
        return Selected(self.view, self.row)

    def action_filter(self) -> None:
        """Choose which plans are shown."""
        if self.view is not None:
            self.app.push_screen(FilterScreen(self.view.filter, self.view.study), self.apply_filter)

    def apply_filter(self, chosen: Filter | None) -> None:
        """Show what a filter lets through; None leaves all as it is."""
        if self.view is not None and chosen is not None:
            self.view = replace(self.view, filter=chosen)
            self._refresh_view()

    def action_compare(self) -> None:
        """The selected plan beside another."""
        if self.selected is not None:
            self.app.push_screen(CompareScreen(self.selected, self.marked))

    def action_export(self) -> None:
        """Write the selected plan for a serving stack."""
        if self.selected is not None:
            self.app.push_screen(ExportScreen(self.selected))

    def action_validate(self) -> None:
        """Run the model with the selected plan."""
        if self.selected is not None:
            self.app.push_screen(ValidateScreen(self.selected))

    def action_help(self) -> None:
        """Keys and marks."""
        self.app.push_screen(HelpScreen(self))

    def commands(self) -> Iterable[tuple[str, str, Callable[[], object]]]:
        """For the palette: name, help, what it does."""
        for axis in AXES:
            yield f"Across: {axis.label}", "Figure across", partial(self.choose_axis, "x", axis)
            yield f"Upward: {axis.label}", "Figure upward", partial(self.choose_axis, "y", axis)
        yield "Show all plans", "Take the filter away", partial(self.apply_filter, Filter())
        for binding in self.BINDINGS:
            if isinstance(binding, Binding) and binding.tooltip and "(" not in binding.action:
                action = getattr(self, f"action_{binding.action}")
                yield binding.description, binding.tooltip, action
