"""Defaults from files: which wins, whom they reach, and mistakes with file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.__main__ import main

ESTIMATE = ("estimate", "--model", "llama-8b", "--json", "--quiet")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and an empty folder of the user's settings."""
    monkeypatch.setattr("kvtune.cli.config.user_file", lambda: tmp_path / "user" / "kvtune.toml")
    (tmp_path / "user").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_nearer_file_wins_and_the_command_line_over_all(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for path, text in (
        (here.parent / "user" / "kvtune.toml", 'gpu = "a40"\n'),
        (here / "pyproject.toml", '[tool.kvtune]\ngpu = "l4"\n[project]\nname = "mine"\n'),
        (here / "kvtune.toml", '[estimate]\ngpu = "4090"\n'),
    ):
        path.write_text(text)
        found.append(answer(capsys, *ESTIMATE)["gpu"])
    assert found == ["a40", "l4", "rtx-4090"]
    assert answer(capsys, *ESTIMATE, "--gpu", "h100")["gpu"] == "h100-sxm"


def test_one_of_several_answers_that_was_typed_wins_over_another_from_a_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "kvtune.toml").write_text("[serve-sim]\nrate = 4\n")
    asked = ("serve-sim", "-m", "smollm2-135m", "-g", "h100", "--requests", "6", "--json", "-q")
    lengths = ("--prompt", "64", "--output", "4")
    assert "4 requests a second" in answer(capsys, *asked, *lengths)["requests"]["source"]
    typed = answer(capsys, *asked, *lengths, "--concurrency", "2")
    assert "2 requests at once" in typed["requests"]["source"]
    assert main([*asked, *lengths, "--concurrency", "2", "--rate", "3"]) == 2  # both were typed
    assert "give one of" in capsys.readouterr().err


def test_a_list_is_several_and_a_required_option_may_come_from_the_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "kvtune.toml").write_text(
        'gpu = "4090"\njson = true\nquiet = true\n'
        '[estimate]\nmodel = "llama-8b"\ncontext = ["4k", 8192]\nprice-per-hour = 0.36\n'
    )
    rows = answer(capsys, "estimate")["rows"]
    assert [row["context_tokens"] for row in rows] == [4096, 8192]
    assert rows[0]["cost_per_million_tokens"]["value"] == pytest.approx(
        100 / rows[0]["tokens_per_second"]["value"]
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpux = 1", ("kvtune.toml: gpux", "--gpux", "'gpu'")),
        ("[estimat]\nbatch = 1", ("kvtune.toml: estimat:", "'estimate'")),
        ("[estimate]\nbacth = 1", ("kvtune.toml: estimate.bacth", "'batch'")),
        ("[estimate]\ngpus = 0", ("kvtune.toml: estimate.gpus = 0", "--gpus")),
        ('[estimate]\nstack = "x"', ("kvtune.toml: estimate.stack = 'x'", "vllm")),
        ("[estimate]\nquiet = 1", ("kvtune.toml: estimate.quiet", "true or false")),
        ("[estimate]\nmodel = 2020-01-01", ("kvtune.toml: estimate.model", "neither")),
        ('[estimate]\nmem = "16"', ("taken from kvtune.toml: estimate.mem = '16'",)),
        ("[estimate", ("kvtune.toml: this is no TOML", "end of a table")),
    ],
)
def test_mistakes_are_told_with_file_and_key(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, told: tuple[str, ...]
) -> None:
    (here / "kvtune.toml").write_text(text)
    assert main(["estimate", "--model", "llama-8b", "--gpu", "4090"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(words in captured.err for words in told), captured.err


def test_a_broken_file_does_not_keep_help_away(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "kvtune.toml").write_text("[")
    assert main(["estimate", "--help"]) == 0
    assert "--total-gpus" in capsys.readouterr().out


def test_a_pyproject_of_others_is_left_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "pyproject.toml").write_text("[tool.ruff]\ngpux = 1\n")
    assert answer(capsys, *ESTIMATE, "--gpu", "4090")["gpu"] == "rtx-4090"
