"""Trials shared by workers: none lost, none done twice, also when workers are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tests.postgres import postgres, programs
from kvtune.tuner.shared_study import Patience, create, finished, missing, open_storage, work
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.study import run_study
from kvtune.tuner.worker import join, publish, share

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = Patience(heartbeat_s=1, grace_s=2, poll_s=0.2)


def random_of(number: int) -> Any:
    import optuna

    return optuna.samplers.RandomSampler(seed=number)


def test_every_trial_is_done_once_and_no_more(tmp_path: Path) -> None:
    study = create(open_storage(f"sqlite:///{tmp_path}/s.db"), "one", 5, ["minimize"])
    asked: list[int] = []

    def objective(trial: Any) -> list[float] | None:
        asked.append(trial.number)
        x = trial.suggest_float("x", 0, 1)
        return None if trial.number == 2 else [x]

    assert work(study, objective, random_of) == 5
    assert asked == list(range(5)) == list(finished(study))
    assert work(study, objective, random_of) == 0


def test_what_a_dead_worker_left_is_done_again_with_its_choices(tmp_path: Path) -> None:
    """As a worker leaves it that dies in a trial, and one that dies while it puts a trial back."""
    from optuna.trial import TrialState

    study = create(open_storage(f"sqlite:///{tmp_path}/s.db"), "one", 4, ["minimize"])
    begun = study.ask()
    chosen = begun.suggest_float("x", 0, 1)
    study.tell(begun, state=TrialState.FAIL)
    found: list[float] = []

    def objective(trial: Any) -> list[float]:
        found.append(trial.suggest_float("x", 0, 1))
        return [found[-1]]

    work(study, objective, random_of)
    assert found.count(chosen) == 1
    assert len(found) == len(finished(study)) == 4
    assert not missing(study)


def test_a_storage_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="storage cannot be opened"):
        open_storage(f"sqlite:///{tmp_path}/no/such/folder/s.db")


def _sleeper(url: str, sleep_s: float) -> None:
    import optuna

    study = optuna.load_study(study_name="s", storage=open_storage(url, QUICK))

    def objective(trial: Any) -> list[float]:
        time.sleep(sleep_s)
        return [trial.suggest_float("x", 0, 1)]

    work(study, objective, random_of, QUICK)


@pytest.mark.full
@pytest.mark.skipif(programs() is None, reason="PostgreSQL's programs are not installed")
def test_no_trial_is_lost_or_done_twice_in_postgresql_when_workers_are_killed() -> None:
    pytest.importorskip("psycopg")
    with postgres() as url:
        study = create(open_storage(url, QUICK), "s", 30, ["minimize"])
        spawn = multiprocessing.get_context("spawn")
        crew = [spawn.Process(target=_sleeper, args=(url, 0.2)) for _ in range(3)]
        for process in crew:
            process.start()
        while len(finished(study)) < 3:
            time.sleep(0.2)
        pid = crew[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for process in crew:
            process.join(120)
        assert len(finished(study)) == 30
        assert not missing(study)


@pytest.fixture
def shared(make_tables: Callable[..., Tables], tmp_path: Path) -> Any:
    """A small made-up search of Llama, its tables those of a source with as many heads."""
    tables = make_tables(layers=32, kv_heads=8, count=3)
    request = llama(tmp_path, trials=6, storage=f"sqlite:///{tmp_path}/study.db", sequences=2)
    from kvtune.tuner.asked import solver_of

    return request, solver_of(request, QualitySource(tables, _none())), solver_of


def _none() -> Any:
    from kvtune.simulator.quality.calibration import NONE

    return NONE


def test_a_worker_does_a_searchs_trials_from_its_folder_alone(shared: Any, tmp_path: Path) -> None:
    request, solver, solver_of = shared
    made = publish(request, solver, "key", 6, "tpe")
    assert join(tmp_path, solver_of) == 6
    share(made, solver, tmp_path / "study.journal")
    candidates = run_study(solver, trials=6, journal=tmp_path / "study.journal")
    assert len(candidates) == 6


def test_a_folder_without_a_shared_search_is_told(shared: Any, tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match="no search shares its trials"):
        join(tmp_path / "none", shared[2])
