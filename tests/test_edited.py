"""A policy that was edited in its run directory: its loss is not the plan's, and it is kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import kvtune
from kvtune.__main__ import main
from kvtune.cli.inputs import read_policy_input
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.edited import edited_files

EDITED = "edited since it was searched"


@pytest.fixture
def run_dir(packaged: Tables, tmp_path: Path) -> Path:
    """A finished search, whose plan was then edited: int2 in place of its options' formats."""
    folder = tmp_path / "run"
    kvtune.search("llama-8b", "4090", "16GB", run_dir=folder, batch=1)
    assert not edited_files(folder)
    edit(folder)
    return folder


def edit(folder: Path) -> None:
    """Put another policy into the file, under the name and the loss of the old."""
    plan = folder / "policy.yaml"
    lines = plan.read_text("utf-8").splitlines()
    ends = next(n for n, line in enumerate(lines) if line.startswith(("options:", "policy:")))
    new = "policy: {method: snapkv, budget: 2%}"
    plan.write_text("\n".join([*lines[:ends], new]) + "\n", "utf-8")


def test_nothing_is_said_of_what_an_edited_plan_loses(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read_policy_input(run_dir)
    assert document.provenance is not None
    assert document.provenance.quality is not None
    assert document.provenance.quality.kl_nats_per_token is None
    assert EDITED in str(document.provenance.quality)
    assert document.policy.name == "snapkv 2% bf16"
    assert main(["export", str(run_dir), "--compare"]) == 0
    assert "snapkv 2% bf16 on every stack" in (said := capsys.readouterr().out)
    assert EDITED in said
    assert main(["estimate", "--model", "llama-8b", "--policy", str(run_dir)]) in (0, 3)
    assert EDITED in capsys.readouterr().out


def test_an_edited_plan_has_no_card(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(run_dir)]) == 2
    assert EDITED in capsys.readouterr().err
    assert not (run_dir / "card").exists()


def test_the_same_search_keeps_the_edited_file_and_names_it(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kept in ("policy.edited.yaml", "policy.edited2.yaml"):
        edited = (run_dir / "policy.yaml").read_text("utf-8")
        with caplog.at_level(logging.WARNING):
            kvtune.search("llama-8b", "4090", "16GB", run_dir=run_dir, batch=1)
        assert (run_dir / kept).read_text("utf-8") == edited
        assert kept in caplog.text
        assert not edited_files(run_dir)
        edit(run_dir)


def test_a_silenced_search_still_says_what_it_has_moved(
    run_dir: Path,
) -> None:
    words = ["search", "--model", "llama-8b", "--gpu", "4090", "--mem", "16GB", "-q"]
    ran = subprocess.run(  # noqa: S603 - this checkout's own command
        [sys.executable, "-m", "kvtune", *words, "--run-dir", str(run_dir)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "policy.yaml was edited since it was searched" in ran.stderr
    assert str(run_dir / "policy.edited.yaml") in ran.stderr
