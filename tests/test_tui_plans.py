"""The table of plans, colours, words on the plot, and what if that leaves no trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.text import Text
from textual.pilot import Pilot
from textual.strip import Strip
from textual.widgets import Input

from kvtune.common.errors import KvtuneError
from kvtune.profiles.gpus import find_gpu
from kvtune.tests.made_up import write_study
from kvtune.tests.test_tui_app import FakeFeed, drive, screen_of
from kvtune.tui.palette import FRONT
from kvtune.tui.screens.validate import model_of
from kvtune.tui.widgets.canvas import PlotCanvas
from kvtune.tui.widgets.keys import Keys
from kvtune.tui.widgets.plan_panel import FigureLines, PlanPanel
from kvtune.tui.widgets.plans_table import PlansTable
from kvtune.tui.widgets.plot_labels import labels, placed, together
from kvtune.tui.widgets.ticks import LogTicks, nothing_of, place, zero_of
from kvtune.tui.widgets.what_if import WhatIf
from kvtune.tuner.explore.dimensions import DIMENSIONS
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return StudyReader(write_study(tmp_path_factory.mktemp("runs") / "run"), lambda: 0.0).read()


def test_the_table_is_sorted_searched_and_moves_the_cursor(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        table = screen.query_one(PlansTable)
        assert not table.display
        await pilot.press("p")
        assert table.display
        assert table.has_focus
        losses = study.plans.kl[table.shown, 0]
        assert (np.diff(losses) >= 0).all()
        await pilot.press("r")
        assert (np.diff(study.plans.kl[table.shown, 0]) <= 0).all()
        await pilot.press("home")
        assert screen.row == int(study.plans.kl[:, 0].argmax())
        await pilot.press("S", "r")
        assert study.plans.trial[table.shown].tolist() == sorted(study.plans.trial.tolist())
        await pilot.press("slash", *"layer")
        found = {study.plans.parameters[row]["split"] for row in table.shown.tolist()}
        assert found == {"layers"}
        await pilot.press("escape")
        assert len(table.shown) == len(study.plans)
        assert screen.query_one("#search", Input).value == ""
        await pilot.press("p")
        assert not table.display

    drive(FakeFeed(study), steps, (100, 30))


def test_what_if_is_marked_and_escape_leaves_no_trace(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        view = screen.view
        assert view is not None
        before, row = view.figures.memory.copy(), screen.row
        await pilot.press("w", "right", "right", "right")
        assert screen.view is not None
        assert screen.view.is_what_if
        assert "WHAT IF" in str(screen.query_one("#plot-front").border_title)
        assert "what if" in str(screen.query_one(PlanPanel).border_title)
        assert "chosen, what if" in str(screen.query_one(PlanPanel).border_title)
        await pilot.press("escape")
        assert not screen.view.is_what_if
        assert screen.view.setting == Setting.asked(study.facts)
        assert np.array_equal(screen.view.figures.memory, before)
        assert (screen.row, screen.has_class("-what-if")) == (row, False)
        assert "WHAT IF" not in str(screen.query_one("#plot-front").border_title)

    drive(FakeFeed(study), steps, (120, 40))


def test_memory_follows_the_card(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("w")
        panel = screen_of(pilot).query_one(WhatIf)
        asked = panel.setting
        share = asked.memory_bytes / asked.gpu.visible_bytes
        other = find_gpu("h200")
        panel.gpu.place = [stop.value.slug for stop in panel.gpu.stops].index(other.slug)
        await pilot.pause()
        assert panel.setting.memory_bytes == pytest.approx(share * other.visible_bytes, rel=1e-6)
        panel.gpu.place = [stop.value.slug for stop in panel.gpu.stops].index(asked.gpu.slug)
        await pilot.pause()
        assert panel.setting == asked

    drive(FakeFeed(study), steps, (120, 40))


def test_every_colour_parts_the_shown_plans(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        for dimension in DIMENSIONS:
            await pilot.press("k")
            assert screen.view is not None
            assert screen.view.colour is dimension
            groups = screen.view.groups
            rows = np.concatenate(list(groups.values()))
            assert sorted(rows.tolist()) == screen.view.rows.tolist()
            for name, members in groups.items():
                assert {dimension.values(study)[row] for row in members.tolist()} == {name}
        await pilot.press("k")
        assert screen.view is not None
        assert screen.view.groups == {}

    drive(FakeFeed(study), steps)


def test_baselines_are_named_and_the_best_says_how_far_it_is(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        view = screen_of(pilot).view
        assert view is not None
        found = labels(view)
        assert study.outcome is not None
        ours, *others = (each.best.value for each in study.outcome.baselines)
        (best,) = (each for each in found if each.best)
        assert f"{min(others) / ours:.2g} x the plan's" in best.words
        assert [each.y for each in found] == sorted(others, reverse=True)

    drive(FakeFeed(study), steps)


def test_words_on_the_plot_keep_apart_and_inside() -> None:
    wanted = [(5, 4, "first"), (6, 4, "second"), (38, 4, "third"), (5, 0, "above")]
    found = placed(wanted, 40, 10)
    assert len({line for _, line, _ in found}) == len(found) >= 3
    assert all(column > 0 and column + len(words) < 40 for column, _, words in found)
    assert all(0 < line < 10 for _, line, _ in found)


def test_points_that_hide_one_another_have_one_label_which_is_never_left_out() -> None:
    points = [(20, 4, "AdaKV"), (21, 4, "pyramid"), (20, 4, "uniform 12 x the plan's"), (5, 7, "h")]
    (both, other) = together(points)
    assert both == (20, 4, "AdaKV, pyramid, uniform 12 x the plan's")
    assert other == (5, 7, "h")
    ((column, line, words),) = placed([both], 45, 10)
    assert line != 4, "there is no room beside the marks, and none of them may be hidden"
    assert column > 0
    assert column + len(words) < 45


def test_a_loss_near_nothing_does_not_squash_the_others() -> None:
    losses = np.array([1e-11, 0.001, 0.01, 0.1])
    zero = zero_of(losses)
    assert zero is not None
    assert nothing_of(losses, zero).startswith("<")
    at = place(losses, zero)
    assert at[3] - at[1] > 0.7 * np.ptp(at)
    assert zero_of(np.array([0.001, 0.1])) is None
    assert nothing_of(np.array([0.0, 0.1]), zero_of(np.array([0.0, 0.1]))) == "0"


@pytest.mark.parametrize(("low", "high"), [(2.11, 2.39), (900.0, 1100.0), (1e-5, 10.0), (3.0, 3.2)])
def test_every_axis_has_ticks(low: float, high: float) -> None:
    ticks = LogTicks()
    places = ticks.get_ticks(np.log10(low), np.log10(high))
    assert 2 <= len(places) <= 8
    assert all(np.log10(low) <= x <= np.log10(high) for x in places)
    words = ticks.get_labels_for_ticks(places)
    assert len(set(words)) == len(words)


def test_ten_thousand_lines_are_made_only_where_they_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = StudyReader(write_study(tmp_path / "run", 500), lambda: 0.0).read()
    made: list[int] = []
    cells = PlansTable._cells

    def counted(table: PlansTable, view: View, row: int) -> list[str]:
        made.append(row)
        return cells(table, view, row)

    monkeypatch.setattr(PlansTable, "_cells", counted)

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("p")
        await pilot.pause()
        assert 5 < len(set(made)) < 60

    drive(FakeFeed(study), steps, (100, 30))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_keys_that_do_not_fit_are_left_out_whole(study: Study, width: int) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        keys = screen_of(pilot).query_one(Keys)
        line = keys.render()
        assert isinstance(line, Text)
        assert 0 < line.cell_len <= width
        words = [f"{shown} {what}" for shown, what, _ in keys._shown()]
        told = [each for each in words if f" {each}" in line.plain]
        assert (
            line.plain
            == "".join(f" {each}" for each in told)
            == "".join(f" {each}" for each in words[: len(told)])
        )
        assert len(told) == len(words) or width < 200

    drive(FakeFeed(study), steps, (width, 40))


def test_a_click_on_a_key_presses_it(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        line = screen.query_one(Keys).render()
        assert isinstance(line, Text)
        at = line.plain.index("k Colour")
        assert screen.view is not None
        assert screen.view.colour is None
        await pilot.click(Keys, offset=(at + 2, 0))
        await pilot.pause()
        assert screen.view.colour is DIMENSIONS[0]

    drive(FakeFeed(study), steps, (120, 40))


def test_of_another_plan_only_lines_that_changed_are_painted(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        lines = screen.query_one(FigureLines)
        painted: list[int] = []
        one_line = lines.render_line

        def counted(y: int) -> Strip:
            painted.append(y)
            return one_line(y)

        lines.render_line = counted  # type: ignore[method-assign]
        before = [line.plain for line in lines.lines(lines.size.width)]
        await pilot.press("left")
        await pilot.pause(0.1)
        after = [line.plain for line in lines.lines(lines.size.width)]
        changed = {y for y, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1}
        assert set(painted) == changed
        assert 0 < len(changed) < len(after)

    drive(FakeFeed(study), steps, (120, 40))


def test_sliders_of_what_if_are_made_when_they_are_asked_for(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        assert not screen_of(pilot).query(WhatIf)
        await pilot.press("escape")
        await pilot.press("w")
        assert screen_of(pilot).query_one(WhatIf).context.has_focus

    drive(FakeFeed(study), steps, (120, 40))


def test_no_colour_hides_a_plan_of_the_front(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        plot = screen_of(pilot).query_one("#plot", PlotCanvas)

        def discs() -> set[tuple[int, int]]:
            lines = enumerate(plot._buffer)
            return {(x, y) for y, line in lines for x, mark in enumerate(line) if mark == FRONT}

        plain = discs()
        assert plain
        for _ in DIMENSIONS:
            await pilot.press("k")
            await pilot.pause()
            assert discs() == plain

    drive(FakeFeed(study), steps, (80, 24))


def test_a_live_run_asks_for_the_model_that_the_search_did_and_for_no_other(tmp_path: Path) -> None:
    study = StudyReader(write_study(tmp_path / "run", 5)).read()
    selected = SimpleNamespace(study=study)
    question = study.folder / "config.json"
    question.write_text('{"model": "/models/mine"}')
    assert model_of(selected) == "/models/mine"  # type: ignore[arg-type]
    for damaged in ("{", "[]", '{"model": 7}'):
        question.write_text(damaged)
        with pytest.raises(KvtuneError, match=r"config\.json"):
            model_of(selected)  # type: ignore[arg-type]
    question.unlink()
    assert model_of(selected) == study.facts.shape.name  # type: ignore[arg-type]
