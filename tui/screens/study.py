"""What the main screen shows of a study: snapshots as they arrive, drawn at the cursor."""

from __future__ import annotations

from dataclasses import replace

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Input, Static

from kvtune.common.errors import KvtuneError
from kvtune.tui.selected import Selected
from kvtune.tui.widgets.heat_map import Shade
from kvtune.tui.widgets.keys import Keys
from kvtune.tui.widgets.legend import Legend
from kvtune.tui.widgets.notice import Notice, too_small
from kvtune.tui.widgets.plan_panel import PlanPanel
from kvtune.tui.widgets.plans_table import PlansTable
from kvtune.tui.widgets.plot import FrontPlot
from kvtune.tui.widgets.status import status
from kvtune.tui.widgets.what_if import WhatIf
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures_of


class StudyScreen(Screen[None]):
    """Holds the cursor; draws snapshots and views, computes nothing of its own."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide"), (170, "-huge")]  # noqa: RUF012

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
        self.app.theme_changed_signal.subscribe(self, lambda _: self.draw_cursor())

    # --- snapshots -------------------------------------------------------------------------

    async def arrived(self, study: Study) -> None:
        """Draw a snapshot; the cursor stays on its plan."""
        was_lost, self.error = self.error, None
        if self.view is None:
            if not self.query("#body"):
                await self._mount_body()
            self.draw(study, Setting.asked(study.facts))
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
            if panel := self.what_if:
                panel.offer(study.facts)
            self.draw(study, Setting.asked(study.facts))
            return
        if followed:
            self.row = None
        self.draw(study, self.view.setting)

    def lost(self, error: KvtuneError) -> None:
        """The storage cannot be read now."""
        self.error = error
        self._show_state()

    def draw(self, study: Study, setting: Setting) -> None:
        """A new view of a snapshot at a setting; an impossible setting keeps the last figures."""
        panel = self.what_if
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
        self.refresh_view()

    def refresh_view(self) -> None:
        """Draw the view as it is, with the cursor on a plan that is shown."""
        view = self.view
        if view is None:
            return
        if self.row is None or self.row not in view.rows:
            self.row = view.start
        self._show_state()
        self.draw_cursor()

    def draw_cursor(self) -> None:
        """Draw the plot, the table and the plan where the cursor stands now."""
        view = self.view
        if view is None or not len(view.study.plans):
            return
        self.query_one(FrontPlot).show(view, self.row, self.marked)
        self.query_one(Legend).show(view)
        if self.shows_table:
            self.query_one(PlansTable).show(view, self.row)
        if self.selected is not None:
            self.query_one(PlanPanel).show(self.selected, self.shade)

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
            self.call_after_refresh(self.draw_cursor)

    @property
    def shows_table(self) -> bool:
        """Whether the table of plans is on screen."""
        return self.has_class("-plans") or self.has_class("-huge")

    @property
    def what_if(self) -> WhatIf | None:
        """The sliders, once they were asked for."""
        return self.query_one_optional(WhatIf)

    @property
    def selected(self) -> Selected | None:
        """The plan under the cursor."""
        if self.view is None or self.row is None:
            return None
        return Selected(self.view, self.row)
