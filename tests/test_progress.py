"""Progress where no bar can be drawn: lines with the remaining time, not too many."""

from __future__ import annotations

import itertools

import pytest
from rich.progress import Progress

from kvtune.common.progress import Bars, Silent, _time_left


def test_a_pipe_gets_lines_with_the_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = itertools.count(0, 2)
    assert list(Bars(lambda: next(seconds)).track(range(8), "working", 8)) == list(range(8))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "working ...",
        "working: 3 of 8, 10 s left",
        "working: 6 of 8, 4 s left",
    ]


def test_quick_work_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    list(Bars(lambda: 0.0).track(range(1000), "working"))
    assert capsys.readouterr().err == "working ...\n"


def test_silence_yields_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Silent().track(iter("abc"), "working")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_terminals_bar_tells_what_remains_after_one_slow_step() -> None:
    """Steps of a minute: rich's own column would have forgotten the only one that is done."""
    now = [0.0]
    bars = Progress(get_time=lambda: now[0], disable=True)
    number = bars.add_task("capturing", total=9)
    assert str(_time_left().render(bars.tasks[0])) == ""
    now[0] = 60.0
    bars.update(number, completed=1)
    assert str(_time_left().render(bars.tasks[0])) == "480 s left"


def test_of_no_items_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Bars().track([], "capturing", 0)) == []
    assert capsys.readouterr() == ("", "")
