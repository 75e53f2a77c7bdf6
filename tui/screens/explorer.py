"""The main screen: what its keys and commands do with a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from textual import on
from textual.widgets import Input

from kvtune.tui.screens.compare import CompareScreen
from kvtune.tui.screens.export import ExportScreen
from kvtune.tui.screens.filters import FilterScreen
from kvtune.tui.screens.help import HelpScreen
from kvtune.tui.screens.keys import KEYS
from kvtune.tui.screens.study import StudyScreen
from kvtune.tui.screens.validate import ValidateScreen
from kvtune.tui.widgets.heat_map import SHADES
from kvtune.tui.widgets.plans_table import PlansTable
from kvtune.tui.widgets.plot import FrontPlot
from kvtune.tui.widgets.what_if import WhatIf
from kvtune.tuner.explore.axes import AXES, Axis, Filter
from kvtune.tuner.explore.view import Side
from kvtune.tuner.explore.what_if import Setting


class ExplorerScreen(StudyScreen):
    """Moves the cursor, changes the view, and opens the other screens."""

    BINDINGS = [*KEYS]  # noqa: RUF012

    # --- moving ----------------------------------------------------------------------------

    @on(FrontPlot.Picked)
    @on(PlansTable.Picked)
    def move_cursor(self, event: FrontPlot.Picked | PlansTable.Picked) -> None:
        """Show the plan that was picked in the plot or the table."""
        if event.row != self.row:
            self.row = event.row
            self.draw_cursor()

    @on(WhatIf.Changed)
    def try_setting(self, event: WhatIf.Changed) -> None:
        """Memory and time elsewhere."""
        if self.view is not None:
            self.draw(self.view.study, event.setting)

    def action_go_chosen(self) -> None:
        """Back to the chosen plan."""
        if self.view is not None and self.view.start is not None:
            self.row = self.view.start
            self.draw_cursor()

    def action_axis(self, which: Side) -> None:
        """The next figure that the other axis does not show."""
        if self.view is not None:
            self.view = self.view.with_next_axis(which)
            self.refresh_view()

    def choose_axis(self, which: Side, axis: Axis) -> None:
        """Show a figure on an axis; one that the other axis shows changes places with it."""
        if self.view is not None:
            self.view = self.view.with_axis(which, axis)
            self.refresh_view()

    def action_colour(self) -> None:
        """Plans coloured by the next of their properties, or by none."""
        if self.view is not None:
            self.view = self.view.with_next_colour()
            self.draw_cursor()

    def action_plans(self) -> None:
        """The table in the place of the plot, where both have no room; else the way to it."""
        table, plot = self.query_one(PlansTable), self.query_one(FrontPlot)
        away = table.has_focus
        self.set_class(not away and not self.has_class("-huge"), "-plans")
        (plot if away else table).focus()
        self.draw_cursor()

    def action_search(self) -> None:
        """Write words that plans must hold."""
        self.set_class(not self.has_class("-huge"), "-plans")
        self.add_class("-search")
        self.draw_cursor()
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
        self.draw_cursor()

    def action_mark(self) -> None:
        """Mark this plan, or take its mark away."""
        self.marked = None if self.marked == self.row else self.row
        self.draw_cursor()

    async def action_what_if(self) -> None:
        """Show the sliders, or put them away."""
        if self.view is None:
            return
        panel = self.what_if
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
        if panel := self.what_if:
            panel.offer(self.view.study.facts)
        self.remove_class("-what-if")
        if self.view.is_what_if:
            self.draw(self.view.study, Setting.asked(self.view.study.facts))
        self.query_one(FrontPlot).focus()

    # --- other screens ---------------------------------------------------------------------

    def action_filter(self) -> None:
        """Choose which plans are shown."""
        if self.view is not None:
            self.app.push_screen(FilterScreen(self.view.filter, self.view.study), self.apply_filter)

    def apply_filter(self, chosen: Filter | None) -> None:
        """Show what a filter lets through; None leaves all as it is."""
        if self.view is not None and chosen is not None:
            self.view = replace(self.view, filter=chosen)
            self.refresh_view()

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
        for binding in KEYS:
            if binding.tooltip and "(" not in binding.action:
                action = getattr(self, f"action_{binding.action}")
                yield binding.description, binding.tooltip, action
