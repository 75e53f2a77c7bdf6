"""The lock covers what is declared; what the job with the newest packages does when it fails."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kvtune

ROOT = Path(kvtune.__file__).parent
LOCK = ROOT / "constraints" / "lock.txt"
ROW = re.compile(r"[a-z0-9-]+==[0-9a-z.]+( ; [^/@]+)?")


def declared() -> set[str]:
    """Names of all dependencies of pyproject, of both kinds."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", text, re.M | re.S)
    assert len(tables) == 2
    return {n.lower() for t in tables for n in re.findall(r'^  "([\w-]+)', t, re.M)}


def pinned(file: str) -> set[str]:
    lines = (ROOT / "constraints" / file).read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0] for line in lines if "==" in line}


def test_every_declared_package_is_pinned() -> None:
    assert declared() <= pinned("lock.txt") | pinned("cpu.txt")
    assert not pinned("lock.txt") & pinned("cpu.txt")


def test_the_lock_holds_pins_alone() -> None:
    rows = [r for r in LOCK.read_text(encoding="utf-8").splitlines() if not r.startswith("#")]
    assert len(rows) > 80
    assert [row for row in rows if not ROW.fullmatch(row)] == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the script and the lock, with stand-ins for the programs that it calls."""
    for folder in (".ci", "constraints"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "bin").mkdir()
    return tmp_path


def newest(checkout: Path, days_old: int = 0, **programs: str) -> tuple[int, str]:
    """Exit status and output, where programs are lines of shell; the others do nothing."""
    upgraded = checkout / "upgraded"
    freeze = f"freeze*) test -e {upgraded} && echo a==2 || echo a==1;; "
    install = programs.pop("install", f"touch {upgraded}")
    pip = f'case "$*" in {freeze} *) {install};; esac'
    for name in ("pytest", "ruff", "mypy"):
        stand_in(checkout / "bin" / name, programs.pop(name, "exit 0"))
    stand_in(checkout / "bin" / "pip", pip)
    made = datetime.date.today() - datetime.timedelta(days=days_old)
    (checkout / "constraints" / "lock.txt").write_text(f"# Made on {made} by: x\na==1\n")
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(  # noqa: S603
        ["bash", str(checkout / ".ci" / "newest")],  # noqa: S607
        capture_output=True, text=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    return done.returncode, done.stdout


def stand_in(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


SCREENS = 'case "$*" in *test_tui_app*) exit 1;; esac'
CACHES = 'case "$*" in *test_runtime_cache*) exit 1;; esac'


def test_newest_packages_that_work_are_listed(checkout: Path) -> None:
    status, said = newest(checkout)
    assert status == 0
    assert "a==2" in said
    assert "all is well" in said


def test_a_lock_that_holds_the_newest_needs_no_second_run(checkout: Path) -> None:
    status, said = newest(checkout, install="exit 0", pytest="exit 1")
    assert status == 0
    assert "holds them already" in said


def test_a_network_that_fails_breaks_nothing_and_is_said(checkout: Path) -> None:
    status, said = newest(checkout, days_old=400, install="echo no route to host; exit 1")
    assert status == 0
    assert "NOT TRIED" in said


def test_packages_that_cannot_be_installed_together_break_the_run(checkout: Path) -> None:
    status, said = newest(checkout, install="echo ERROR: ResolutionImpossible >&2; exit 1")
    assert status == 1
    assert "CANNOT BE INSTALLED TOGETHER" in said


def test_what_hits_kvtunes_own_work_breaks_the_run_at_once(checkout: Path) -> None:
    status, said = newest(checkout, pytest=CACHES)
    assert status == 1
    assert "KVTUNE DOES NOT WORK" in said


@pytest.mark.parametrize(("days", "status"), [(0, 0), (30, 0), (32, 1)])
@pytest.mark.parametrize("broken", [{"pytest": SCREENS}, {"mypy": "exit 1"}, {"ruff": "exit 1"}])
def test_the_rest_breaks_it_when_the_lock_is_old(
    checkout: Path, broken: dict[str, str], days: int, status: int
) -> None:
    found, said = newest(checkout, days_old=days, **broken)
    assert found == status
    assert "FAILED BESIDE" in said


def test_the_files_that_it_runs_are_there() -> None:
    script = (ROOT / ".ci" / "newest").read_text(encoding="utf-8")
    named = re.findall(r"tests/\w+\.py", script)
    assert len(named) == 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert "\n.ci/newest\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
