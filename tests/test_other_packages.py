"""A wheel from outside adds a method, which is then known everywhere and can be judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.policies import registry
from kvtune.policies.method import PACKAGE, Method, methods
from kvtune.policies.registry import group_of, registered
from kvtune.policies.testing.judge import judge

EXAMPLE = Path(kvtune.__file__).parent / "docs" / "example-policy"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example of the docs is installed from a wheel of its own."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "example"
    shutil.copytree(EXAMPLE, source)  # a build leaves files beside what it builds
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(  # noqa: S603
        [sys.executable, *install, "--target", str(folder), str(source)], check=True
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True
    )


def test_the_command_line_lists_it(elsewhere: dict[str, str]) -> None:
    listed = json.loads(run(["kvtune", "policies", "--json"], elsewhere).stdout)
    assert "middle_out" in {policy["name"] for policy in listed["policies"]}


def test_a_policy_file_may_name_it(elsewhere: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("kvtune_policy: 1\npolicy: {method: {name: middle_out, sinks: 2}, budget: 9}\n")
    ran = run(
        ["kvtune", "estimate", "-m", "smollm2-135m", "-g", "h100", "--policy", str(file)], elsewhere
    )
    assert ran.returncode == 0, ran.stderr


def test_the_suite_judges_it(elsewhere: dict[str, str]) -> None:
    ran = run(["kvtune.policies.testing", "middle_out"], elsewhere)
    assert ran.returncode == 0, ran.stderr
    assert "keeps the highest scores" in ran.stdout


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
