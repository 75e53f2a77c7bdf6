"""Hints that can be followed: each command takes what its error says to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtune.__main__ import main
from kvtune.common.errors import KvtuneError
from kvtune.common.files import other_folder
from kvtune.policies.policy_file.document import read_policy
from kvtune.policies.policy_file.named import read_named
from kvtune.tui.screens.validate import _failure


@pytest.mark.parametrize("words", ["snapkv 250% int4", "snapkv 0% int4"])
def test_a_share_that_is_none_is_told_in_words_that_are_read(words: str) -> None:
    with pytest.raises(KvtuneError, match="is no share of a prompt") as told:
        read_named(words)
    assert "but at least" not in str(told.value.hint)
    assert read_named("snapkv 12.5% int4")


@pytest.mark.parametrize("command", [["estimate", "-m", "llama-8b", "--policy"], ["export"]])
def test_a_folder_that_is_not_there_is_no_misspelt_policy(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "nosuchrun"]) == 2
    said = capsys.readouterr().err
    assert "no file, run directory or policy is called 'nosuchrun'" in said
    assert "Did you mean" not in said


def test_where_to_write_instead_names_no_option_that_a_command_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    assert "KVTUNE_CACHE" in other_folder(tmp_path / "cache" / "traces")
    assert "--" not in other_folder(tmp_path / "run")
    assert "KVTUNE_CACHE" not in other_folder(tmp_path / "run")


def test_a_validation_that_fails_in_the_screen_keeps_its_hint_apart() -> None:
    told = _failure(["loading ...", "error: no weights", "hint: name a folder."])
    assert (str(told), told.hint) == ("no weights", "name a folder.")
    assert str(_failure([])) == "the validation ended without a word"


def policy(method: str, budget: str) -> str:
    """A policy file."""
    return f"kvtune_policy: 1\npolicy:\n  method: {method}\n  budget: {budget}\n"


@pytest.mark.parametrize("budget", ["0", "0%"])
def test_a_budget_of_nothing_is_refused_where_it_is_written(budget: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(policy("snapkv", budget), "utf-8")
    with pytest.raises(KvtuneError, match=r"policy.yaml:4: policy\.budget: .*0") as told:
        read_policy(file)
    assert "12.5%" in str(told.value.hint)


def test_a_method_that_shares_the_other_tokens_may_retain_none() -> None:
    assert read_policy(policy("minicache", "0"))
