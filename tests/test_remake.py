"""Results of quality runs are installed only where they are whole."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtune.common.files import sha256
from kvtune.simulator.quality.tables import Tables
from kvtune.simulator.quality.tables_file import save_tables

CURVES = {family: [{"at": 0.1}] for family in ("uniform", "pyramid", "adakv")}


@pytest.fixture
def remake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with folders of its own in place of the package's."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("remake")
    for name in ("DATA", "RESULTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name, tmp_path / name)
    (tmp_path / "came").mkdir()
    yield module
    sys.modules.pop("remake")


@pytest.fixture
def came(tmp_path: Path, make_tables: Callable[..., Tables]) -> Callable[..., Path]:
    """Write tables that came back, with curves of the baselines or without."""

    def write(curves: Any) -> Path:
        file = tmp_path / "came" / "smollm2-135m.safetensors"
        save_tables(make_tables(), file, {"baselines": curves})
        return file

    return write


def test_tables_come_with_their_hash(
    remake: ModuleType, came: Callable[..., Path], tmp_path: Path
) -> None:
    file = came(CURVES)
    remake._install_tables(file)
    kept = tmp_path / "DATA" / file.name
    assert kept.read_bytes() == file.read_bytes()
    assert (tmp_path / "DATA" / "SHA256SUMS").read_text() == f"{sha256(file)}  {file.name}\n"


@pytest.mark.parametrize("curves", [{}, {**CURVES, "adakv": []}])
def test_tables_without_the_baselines_curves_are_not_taken(
    remake: ModuleType, came: Callable[..., Path], tmp_path: Path, curves: Any
) -> None:
    assert "left as it was" in remake._install_tables(came(curves))
    assert not list((tmp_path / "DATA").iterdir())


def test_a_run_that_failed_in_part_replaces_no_whole_one(
    remake: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "came" / "strongest-h200.json"
    file.write_text(json.dumps({"plans": {}, "baselines": "failed: OutOfMemoryError"}))
    assert not remake._is_whole(file)
    file.write_text(json.dumps({"plans": {}, "baselines": {}}))
    assert remake._is_whole(file)
    assert not remake._is_whole(tmp_path / "came" / "quality.json")


def test_a_calibration_takes_runs_whose_plans_all_ran(remake: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "came" / remake.LONG
    samples = {"a": {"split": "search"}, "b": {"split": "select"}, "c": {"split": "evaluate"}}
    file.write_text(json.dumps({"samples": samples, "plans by sample": {"b": {}}}))
    assert not remake._all_plans_ran(file)
    assert "left as it was" in remake._fit(tmp_path / "came")
    file.write_text(json.dumps({"samples": samples, "plans by sample": {"b": {}, "c": {}}}))
    assert remake._all_plans_ran(file)


def test_an_ended_part_leaves_no_process(remake: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    remake.run([remake.Part("sleeps", (str(script),))], tmp_path / "out", "cpu", 2.0)
    if not (tmp_path / "pid").exists():
        pytest.skip("the part had no time to begin a process of its own")
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    until = time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)
