"""The explorer under Textual's pilot, with a fake feed and no clock.

Remake the pictures with ``pytest tests/test_tui_app.py --snapshot-update`` and look at them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from textual.pilot import Pilot
from textual.widgets import Button, Input, Select, Switch

from kvtune.__main__ import main
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import read_policy
from kvtune.profiles.gpus import find_gpu
from kvtune.tests.made_up import write_study
from kvtune.tui.app import DARK, LIGHT, Explorer
from kvtune.tui.screens.compare import CompareScreen, kinds_table
from kvtune.tui.screens.explorer import ExplorerScreen
from kvtune.tui.screens.filters import FilterScreen
from kvtune.tui.screens.validate import ValidateScreen
from kvtune.tui.widgets.notice import Notice
from kvtune.tui.widgets.plan_panel import PlanPanel
from kvtune.tui.widgets.plot import FrontPlot
from kvtune.tui.widgets.what_if import WhatIf
from kvtune.tuner.explore.axes import BYTES, STEP, Filter
from kvtune.tuner.explore.compare import Side, baseline_side, plan_side
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.what_if import Setting

Steps = Callable[[Pilot[None]], Awaitable[None]]


class FakeFeed:
    """Gives what it is told to, once a read; errors are raised."""

    def __init__(self, *given: Study | KvtuneError) -> None:
        self.given = list(given)

    def read(self) -> Study:
        found = self.given.pop(0) if len(self.given) > 1 else self.given[0]
        if isinstance(found, KvtuneError):
            raise found
        return found


def read(folder: Path, **made: Any) -> Study:
    return StudyReader(write_study(folder, **made), now=lambda: 0.0).read()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read(tmp_path_factory.mktemp("runs") / "run", live=True)


@pytest.fixture(autouse=True)
def colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests asks for."""
    monkeypatch.delenv("NO_COLOR", raising=False)


def drive(feed: FakeFeed, steps: Steps, size: tuple[int, int] = (80, 24)) -> None:
    """Run the explorer without a clock: it reads when the steps ask."""

    async def go() -> None:
        app = Explorer(feed, interval_s=0)
        async with app.run_test(size=size) as pilot:
            await settled(pilot)
            await steps(pilot)

    asyncio.run(go())


async def settled(pilot: Pilot[None]) -> None:
    """The feed has been read, and what it gave is on screen."""
    screen = screen_of(pilot)
    while screen.view is None and screen.error is None:
        await pilot.pause(0.01)
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()


async def painted(pilot: Pilot[None]) -> None:
    """The screen has come to rest: a busy machine paints late."""
    before, now = "", pilot.app.export_screenshot()
    while before != now:
        await pilot.pause(0.05)
        before, now = now, pilot.app.export_screenshot()


def screen_of(pilot: Pilot[None]) -> ExplorerScreen:
    screen = pilot.app.screen_stack[0]
    assert isinstance(screen, ExplorerScreen)
    return screen


def text_of(pilot: Pilot[None], selector: str) -> str:
    return str(pilot.app.screen.query_one(selector).render())


# --- moving --------------------------------------------------------------------------------------


def test_keys_go_along_the_front_and_the_plan_follows(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        assert screen.view is not None
        assert screen.row == study.chosen
        await pilot.press("right")
        expected = screen.view.step(int(study.chosen or 0), 1)
        assert screen.row == expected
        title = screen.query_one(PlanPanel).border_title
        assert title == f"Plan of trial {study.plans.trial[expected]}"
        await pilot.press("home")
        assert screen.row == screen.view.front[0]
        await pilot.press("end")
        assert screen.row == screen.view.front[-1]
        await pilot.press("g")
        assert screen.row == study.chosen

    drive(FakeFeed(study), steps)


def test_the_mouse_picks_the_nearest_plan(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        plot = screen.query_one(FrontPlot)
        assert screen.view is not None
        wanted = int(screen.view.front[2])
        x, y = plot._positions(screen.view, screen.view.front[2:3])
        column, row = plot.get_pixel_from_coordinate(x[0], y[0])
        await pilot.click("#plot", offset=(column, row))
        await pilot.pause()
        assert screen.row is not None
        near = plot.get_pixel_from_coordinate(
            *(v[0] for v in plot._positions(screen.view, screen.view.rows[[screen.row]]))
        )
        assert screen.row == wanted or near == (column, row)

    drive(FakeFeed(study), steps)


@pytest.mark.full
def test_any_two_figures_can_be_seen(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen, seen = screen_of(pilot), set()
        for _ in range(5):
            for _ in range(5):
                assert screen.view is not None
                seen.add((screen.view.x.name, screen.view.y.name))
                screen.action_axis("x")
            await pilot.press("y")
        assert len(seen) == 20
        screen.choose_axis("x", BYTES)
        screen.choose_axis("y", STEP)
        screen.choose_axis("y", BYTES)
        assert screen.view is not None
        assert (screen.view.x, screen.view.y) == (STEP, BYTES)

    drive(FakeFeed(study), steps)


def test_heads_are_seen_by_budget_bits_and_method(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        words = []
        for _ in range(3):
            words.append(text_of(pilot, "#heads-heading").split()[1])
            await pilot.press("h")
        assert words == ["budget", "bits", "method"]

    drive(FakeFeed(study), steps)


def test_what_if_recomputes_every_plan(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        assert screen.view is not None
        before = screen.view.figures
        await pilot.press("w", "right", "right")
        assert screen.view.setting.context_tokens == 2048
        assert (screen.view.figures.prompt_bytes < before.prompt_bytes).all()
        await pilot.press("tab", "right")
        assert screen.view.setting.sequences == 1
        panel = screen.query_one(WhatIf)
        panel.gpu.place = [s.value.slug for s in panel.gpu.stops].index("h100-sxm")
        await pilot.pause()
        assert screen.view.setting.gpu == find_gpu("h100-sxm")
        panel.memory.place = 0
        await pilot.pause()
        assert "does not fit" in text_of(pilot, "#problem")
        assert screen.view.setting.memory_bytes > panel.memory.value

    drive(FakeFeed(study), steps)


def test_a_filter_hides_plans_and_can_hide_all(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        await pilot.press("f")
        asked = pilot.app.screen
        assert isinstance(asked, FilterScreen)
        asked.query_one("#largest-kl", Input).value = "0.01"
        asked.query_one("#split", Select).value = "heads"
        asked.query_one("#fits", Switch).value = True
        asked.query_one("#show", Button).press()
        await pilot.pause()
        assert screen.view is not None
        assert screen.view.filter == Filter(largest_kl=0.01, split="heads", fits=True)
        assert 0 < len(screen.view.rows) < len(study.plans)
        assert screen.row in screen.view.rows
        screen.apply_filter(Filter(largest_kl=0.0, method="snapkv", least_bits=16))
        await pilot.pause()
        assert "No plan is" in text_of(pilot, "#notice")

    drive(FakeFeed(study), steps)


@pytest.mark.full
def test_two_plans_and_a_baseline_are_compared(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("m", "right", "c")
        await pilot.pause()
        screen = pilot.app.screen
        assert isinstance(screen, CompareScreen)
        assert screen.right is not None
        assert screen.right.name == f"plan of trial {study.plans.trial[study.chosen or 0]}"
        await pilot.press("n")
        await pilot.pause()
        assert screen.right.name == "greedy per head"
        assert "differ" in text_of(pilot, "#heads-heading")
        await pilot.press("n", "h")
        await pilot.pause()
        assert screen.right.name == "uniform h2o int3+4"
        assert "not known" in text_of(pilot, "#kinds")
        await pilot.press("escape")
        assert pilot.app.screen is screen_of(pilot)

    drive(FakeFeed(study), steps)


def test_losses_by_kind_are_measured_ones_too_where_a_side_ran_live(study: Study) -> None:
    """Results of older searches have none; then the table is as it was."""
    assert study.outcome is not None
    plan, setting = study.plans[study.chosen or 0], Setting.asked(study.facts)
    ours = plan_side(study, plan, setting)
    theirs = baseline_side(study, study.outcome.baselines[1], plan, setting)
    assert ours.live is not None
    assert ours.live_by_kind == theirs.live_by_kind == {}
    assert kinds_shown(ours, theirs) == ["code", "prose", "retrieval"]
    losses = {kind: Estimate(0.25, 0.1, 0.3, "nats/token", "live") for kind in ("code", "prose")}
    measured = dataclasses.replace(ours, live_by_kind=losses)
    half = {"code": Estimate(0.5, 0.4, 0.6, "nats/token", "live")}
    other = dataclasses.replace(theirs, live_by_kind=half)
    expected = ["code", "prose", "retrieval", "code, live", "prose, live"]
    assert kinds_shown(measured, other) == kinds_shown(other, measured) == expected
    table = kinds_table(measured, other)
    assert isinstance(table, Table)
    assert [[*column.cells][3] for column in table.columns[1:]] == [
        "0.25 [0.1, 0.3] live", "0.5 [0.4, 0.6] live", "0.50 x",
    ]  # fmt: skip
    assert [[*column.cells][4] for column in table.columns[2:]] == ["-", "-"]


def kinds_shown(left: Side, right: Side) -> list[str]:
    table = kinds_table(left, right)
    assert isinstance(table, Table)
    return [str(cell) for cell in table.columns[0].cells]


def test_a_plan_is_exported_as_it_is(tmp_path: Path) -> None:
    study = read(tmp_path / "run")

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("e")
        screen = pilot.app.screen
        screen.query_one("#write", Button).press()
        await pilot.pause()
        assert "wrote" in text_of(pilot, "#words")
        screen.query_one("#stack", Select).value = "vllm"
        await pilot.pause()
        screen.query_one("#write", Button).press()
        await pilot.pause()
        assert "stand-in" in text_of(pilot, "#words")
        screen.query_one("#stand-in", Switch).value = True
        screen.query_one("#write", Button).press()
        await pilot.pause()
        assert "vllm.yaml" in text_of(pilot, "#words")

    drive(FakeFeed(study), steps)
    plan = study.plans[study.chosen or 0]
    path = tmp_path / "run" / "plans" / f"trial-{plan.trial}" / "policy.yaml"
    written = read_policy(path).policy
    assert isinstance(written, Policy)
    assert written.heads == study.policy(plan).heads


ANSWER = {
    "quality": {"kl_nats_per_token": 0.021, "interval": [0.01, 0.03], "tier": "live"},
    "perplexity_change": None,
    "retrieval_accuracy": None,
    "full_cache_accuracy": None,
    "counted_bytes": 12345,
    "device": "cpu",
}


def _saying(code: str) -> Callable[[str, str], list[str]]:
    return lambda policy, model: [sys.executable, "-c", code, policy, model]


def _validate(study: Study, code: str, steps: Steps) -> None:
    async def go(pilot: Pilot[None]) -> None:
        selected = screen_of(pilot).selected
        assert selected is not None
        pilot.app.push_screen(ValidateScreen(selected, _saying(code)))
        await pilot.pause()
        await steps(pilot)

    drive(FakeFeed(study), go)


CODE = Estimate(0.5, 0.4, 0.6, "nats/token", "live")


@pytest.mark.parametrize("answer", [ANSWER, ANSWER | {"by_kind": {"code": CODE.as_dict()}}])
def test_a_live_run_is_kept_and_set_beside_the_prediction(
    tmp_path: Path, answer: dict[str, Any]
) -> None:
    study = read(tmp_path / "run")

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()
        assert "0.021 [0.01, 0.03] live" in text_of(pilot, "#words")

    _validate(study, f"import sys; print({json.dumps(json.dumps(answer))})", steps)
    again = StudyReader(tmp_path / "run").read()
    live = again.live(again.plans[again.chosen or 0])
    assert live is not None
    assert (live.kl.value, live.device) == (0.021, "cpu")
    assert live.by_kind == ({"code": CODE} if "by_kind" in answer else {})


def test_a_live_run_that_fails_says_why(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()
        assert "no weights here" in text_of(pilot, "#words")

    _validate(study, "import sys; print('error: no weights here', file=sys.stderr); exit(2)", steps)


@pytest.mark.full
def test_a_live_run_is_cancelled(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        screen = pilot.app.screen
        assert isinstance(screen, ValidateScreen)
        while screen.process is None:
            await asyncio.sleep(0.01)
        process = screen.process
        await pilot.press("escape")
        assert await process.wait() != 0
        assert pilot.app.screen is screen_of(pilot)

    _validate(study, "import time; time.sleep(60)", steps)


# --- live, lost, empty, small --------------------------------------------------------------------


def test_a_running_search_is_followed(tmp_path: Path) -> None:
    early = read(tmp_path / "a", count=10, finished=False)
    late = read(tmp_path / "b", count=40, finished=False)

    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        assert "trial 10 of 60, running" in text_of(pilot, "#status")
        await pilot.press("home")
        held = screen.row
        pilot.app.read()  # type: ignore[attr-defined]
        await settled(pilot)
        assert "trial 40 of 60, running" in text_of(pilot, "#status")
        assert screen.view is not None
        assert len(screen.view.study.plans) == 40
        assert screen.row == held

    drive(FakeFeed(early, late), steps)


def test_storage_that_goes_away_leaves_what_was_seen(study: Study) -> None:
    gone = KvtuneError("there is no such folder", where="run")

    async def steps(pilot: Pilot[None]) -> None:
        screen = screen_of(pilot)
        pilot.app.read()  # type: ignore[attr-defined]
        await settled(pilot)
        assert "STORAGE LOST: there is no such folder" in text_of(pilot, "#status")
        await pilot.press("right")
        assert screen.row != study.chosen
        pilot.app.read()  # type: ignore[attr-defined]
        await settled(pilot)
        assert "finished" in text_of(pilot, "#status")

    drive(FakeFeed(study, gone, study), steps)


def test_no_study_is_a_written_state(tmp_path: Path) -> None:
    reader = StudyReader(tmp_path / "nowhere")

    async def steps(pilot: Pilot[None]) -> None:
        words = text_of(pilot, "#notice")
        assert "There is no such folder" in words
        assert "kvtune search" in words
        for key in "xyhfmcevwg":
            await pilot.press(key)
        assert pilot.app.screen is screen_of(pilot)

    drive(reader, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("age", "words"), [(0, "no plan that fits yet"), (9999, "holds no plan")])
def test_an_empty_study_is_a_written_state(tmp_path: Path, age: float, words: str) -> None:
    folder = write_study(tmp_path, 0)
    now = (folder / "plans.jsonl").stat().st_mtime + age

    async def steps(pilot: Pilot[None]) -> None:
        assert words in text_of(pilot, "#notice")
        await pilot.press("right", "x", "c", "e", "v", "h")
        assert screen_of(pilot).query_one(Notice).display

    drive(StudyReader(folder, now=lambda: now), steps)  # type: ignore[arg-type]


def test_forty_columns_are_a_written_state(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        assert "This terminal is 40 x 20" in text_of(pilot, "#notice")
        await pilot.resize_terminal(120, 40)
        await pilot.pause()
        assert not screen_of(pilot).query_one(Notice).display

    drive(FakeFeed(study), steps, size=(40, 20))


@pytest.mark.full
def test_light_dark_and_no_colour_show_the_same_marks(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        assert pilot.app.theme == DARK
        await pilot.press("t")
        assert pilot.app.theme == LIGHT
        await pilot.pause()

    drive(FakeFeed(study), steps)
    monkeypatch.setenv("NO_COLOR", "1")

    async def colourless(pilot: Pilot[None]) -> None:
        picture = pilot.app.export_screenshot()
        for mark in "●★◆█▓▒▚":
            assert mark in picture

    drive(FakeFeed(study), colourless, size=(120, 40))


def test_every_command_of_the_palette_has_a_name(study: Study) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        titles = [title for title, *_ in pilot.app.get_system_commands(pilot.app.screen)]
        assert {"Export", "Validate", "Compare", "What if", "Filter", "Show all plans"} <= {*titles}
        await pilot.press("question_mark")
        assert pilot.app.screen is not screen_of(pilot)
        await pilot.press("escape")

    drive(FakeFeed(study), steps)


def test_a_pipe_is_sent_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tui", str(write_study(tmp_path, 2))]) == 2
    assert "kvtune report" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 12])
def test_json_tells_the_study_without_a_screen(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "run", count)
    assert main(["tui", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plans"] == count
    assert (answer["chosen"] is None) == (count == 0)
    if count:
        study = StudyReader(folder).read()
        assert answer["chosen"]["trial"] == study.plans.trial[study.chosen or 0]
        assert answer["chosen"]["trial"] in answer["front"]


def test_no_study_to_find_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tui"]) == 2
    assert "there is no study here" in capsys.readouterr().err


# --- pictures ------------------------------------------------------------------------------------

SCREENS: dict[str, list[str]] = {
    "main": [],
    "bits": ["h", "right"],
    "what-if": ["w", "right", "right"],
    "compare": ["end", "c"],
    "help": ["question_mark"],
    "plans": ["k", "p", "down"],
}


SIZES = {"wide": (120, 40), "narrow": (80, 24)}
QUICK = {"main-wide", "what-if-narrow", "compare-narrow"}
EACH_SCREEN = [
    pytest.param(keys, size, id=f"{name}-{width}",
                 marks=[] if f"{name}-{width}" in QUICK else [pytest.mark.full])
    for name, keys in SCREENS.items()
    for width, size in SIZES.items()
]  # fmt: skip


@pytest.mark.parametrize(("keys", "size"), EACH_SCREEN)
def test_the_screens_are_the_golden_ones(
    study: Study, keys: list[str], size: tuple[int, int], snap_compare: Any
) -> None:
    async def press(pilot: Pilot[None]) -> None:
        await settled(pilot)
        for key in keys:
            await pilot.press(key)
            await painted(pilot)
        await painted(pilot)

    app = Explorer(FakeFeed(study), interval_s=0)
    run: Callable[[Pilot[None]], Coroutine[Any, Any, None]] = press
    assert snap_compare(app, terminal_size=size, run_before=run)
