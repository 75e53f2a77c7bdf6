"""Trials asked for in batches: answered side by side, told in order, the same when interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.question import Question
from kvtune.tuner.samplers import Sampler
from kvtune.tuner.search_options import search_request
from kvtune.tuner.solver import Solver
from kvtune.tuner.study import run_study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def solver(make_tables: Callable[..., Tables]) -> Solver:
    tables = make_tables()
    held = {256: tables.footprints(256, 16)}
    room = 3 * 2 * 2 * 256 * 16 * tables.heads
    return Solver.of(Question(tables, 16, {256: room}, held, 0, lambda *_: 0))


@dataclass(frozen=True)
class Together(Solver):
    """Answers nobody before so many trials are waiting; what each saw as last told is kept."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def answer(self, number: int, parameters: dict[str, Any]) -> Candidate | None:
        self.barrier.wait(timeout=20)
        return super().answer(number, parameters)


class StopsAt(Silent):
    """As Ctrl-C would while a trial is begun."""

    def __init__(self, at: int) -> None:
        self.at = at

    def track(self, items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == self.at:
                raise KeyboardInterrupt
            yield item


def facts(candidates: list[Candidate]) -> list[Any]:
    return [(c.number, c.parameters, c.choice.tolist(), c.kl) for c in candidates]


def test_a_batch_is_answered_side_by_side(solver: Solver) -> None:
    four = Together(solver.question, solver.problems, solver.check, threading.Barrier(4))
    assert facts(run_study(four, trials=16, jobs=4)) == facts(run_study(solver, trials=16, jobs=4))


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("nsga2", marks=pytest.mark.full)])
@pytest.mark.parametrize("cut", [5, 9, pytest.param(18, marks=pytest.mark.full)])
def test_an_interrupted_batch_is_taken_up_where_it_was(
    solver: Solver, tmp_path: Path, sampler: Sampler, cut: int
) -> None:
    """Also where only some trials of a batch had been recorded."""
    whole = run_study(solver, trials=23, jobs=3, sampler=sampler)
    journal = tmp_path / "study.journal"
    with pytest.raises(KeyboardInterrupt):
        run_study(
            solver,
            trials=23,
            jobs=3,
            sampler=sampler,
            journal=journal,
            progress=StopsAt(cut),
        )
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # killed while a batch was being written
    again = run_study(solver, trials=23, jobs=3, sampler=sampler, journal=journal)
    assert facts(again) == facts(whole)


def test_what_one_job_finds_is_what_no_batches_find(solver: Solver) -> None:
    """The defaults come first and do not depend on what is told; later trials do."""
    one, four = (run_study(solver, trials=24, seed=2, jobs=jobs) for jobs in (1, 4))
    assert [c.parameters for c in one[:8]] == [c.parameters for c in four[:8]]
    assert [c.number for c in four] == sorted(c.number for c in four), "told in order"
    assert facts(one) != facts(four), "a batch is asked before any of it is told"


def test_trials_of_a_batch_are_not_the_same_trial_again(solver: Solver) -> None:
    found = run_study(solver, trials=40, jobs=8)
    for start in range(16, 40, 8):
        batch = [str(c.parameters) for c in found if start <= c.number < start + 8]
        assert len(set(batch)) > len(batch) // 2


def test_failed_trials_of_a_batch_are_remembered(solver: Solver, tmp_path: Path) -> None:
    tight = Solver.of(replace(solver.question, rooms={256: 8_000}, sequences=3))
    journal = tmp_path / "study.journal"
    whole = run_study(tight, trials=22, jobs=5, seed=1)
    assert 0 < len(whole) < 22
    run_study(tight, trials=13, jobs=5, seed=1, journal=journal)
    assert facts(run_study(tight, trials=22, jobs=5, seed=1, journal=journal)) == facts(whole)


def test_jobs_and_storage_are_one_or_the_other() -> None:
    with pytest.raises(KvtuneError, match="--jobs answers trials side by side"):
        search_request("llama-8b", "4090", "16GB", jobs=2, storage="sqlite:///x.db")
    with pytest.raises(KvtuneError, match="--jobs 0 is not between"):
        search_request("llama-8b", "4090", "16GB", jobs=0)
