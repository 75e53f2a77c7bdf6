"""Progress where no bar can be drawn: lines with the remaining time, not too many."""

from __future__ import annotations

import itertools

import pytest

from kvtune.common.progress import Bars, Silent


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
