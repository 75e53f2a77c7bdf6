"""A wheel from outside adds a method, which is then known everywhere and can be judged."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import kvtune
from kvtune.__main__ import main
from kvtune.common.errors import KvtuneError
from kvtune.policies import registry
from kvtune.policies.method import PACKAGE, Method, methods
from kvtune.policies.registry import group_of, registered
from kvtune.policies.testing.__main__ import main as judge_by_name
from kvtune.policies.testing.judge import judge

EXAMPLE = Path(kvtune.__file__).parent / "docs" / "example-policy"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example of the docs is installed from a wheel of its own."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "example"
    shutil.copytree(EXAMPLE, source)  # a build leaves files beside what it builds
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(  # noqa: S603
        [sys.executable, *install, "--target", str(folder), str(source)], check=True
    )
    return folder


def test_the_page_writes_the_same_method() -> None:
    """But for the first line, which says where each stands."""
    page = (EXAMPLE.parent / "add-a-policy.md").read_text(encoding="utf-8")
    written = page.split("```python\n", 1)[1].split("```", 1)[0]
    example = (EXAMPLE / "middle_out.py").read_text(encoding="utf-8")
    assert written.split('"""', 2)[2] == example.split('"""', 2)[2]


Ended = tuple[int, str]
"""An exit code and what was printed."""


def ended(command: Callable[[list[str]], int], words: list[str]) -> Ended:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return command(words), out.getvalue()


@pytest.fixture(scope="module")
def printed(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """Three commands where that folder is searched for packages; nothing of it is known after."""
    file = tmp_path_factory.mktemp("policies") / "policy.yaml"
    file.write_text("kvtune_policy: 1\npolicy: {method: {name: middle_out, sinks: 2}, budget: 9}\n")
    estimate = ["estimate", "-m", "smollm2-135m", "-g", "h100", "--policy", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(elsewhere))
        registered.cache_clear()
        try:
            return [
                ended(main, ["policies", "--json"]),
                ended(main, estimate),
                ended(judge_by_name, ["middle_out"]),
            ]
        finally:
            registered.cache_clear()


def test_the_command_line_lists_it(printed: list[Ended]) -> None:
    code, output = printed[0]
    assert code == 0
    assert "middle_out" in {policy["name"] for policy in json.loads(output)["policies"]}


def test_a_policy_file_may_name_it(printed: list[Ended]) -> None:
    code, output = printed[1]
    assert code == 0
    assert output


def test_the_suite_judges_it(printed: list[Ended]) -> None:
    code, output = printed[2]
    assert code == 0, output
    assert "keeps the highest scores" in output


def test_the_suite_fails_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Method):
        name = "greedy"
        source = "wrong on purpose"

        def keep(self, signals: Any, budget: int) -> Any:
            import torch

            heads, tokens, _ = signals.keys.shape
            return torch.arange(tokens).expand(heads, -1)  # whatever the budget is

    known = {**methods(), "greedy": Greedy}
    monkeypatch.setattr("kvtune.policies.testing.judge.methods", lambda: known)
    failed = {verdict.check for verdict in judge("greedy") if verdict.reason}
    assert {"keeps_ascending_indices_within_the_budget", "parts_are_as_planned"} <= failed


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:Thing", "cannot be imported"),
        ("kvtune.policies.signals:Signals", "is no Method"),
        ("kvtune.policies.method:ScoredMethod", "has no name"),
    ],
)
def test_a_broken_entry_point_is_told_by_name(
    monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    entry = EntryPoint("mine", value, group_of(PACKAGE))
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(KvtuneError, match=f"mine = {value} {why}"):
        registered.__wrapped__(PACKAGE, Method)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(KvtuneError) as raised:
        list(judge("snapkw"))
    assert "snapkv" in str(raised.value.hint)
