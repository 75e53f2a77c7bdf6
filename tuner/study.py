"""The outer search: an Optuna study over few, meaningful choices, the Gram solver inside.

Sampling runs in memory; finished trials are recorded in a journal, so that an interrupted study
goes on where it was. Trials are asked for in batches, answered side by side, and told in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress, Silent
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.journal import Journal, Trial
from kvtune.tuner.proposals import enqueue_defaults, suggest
from kvtune.tuner.question import Question
from kvtune.tuner.samplers import Sampler, sampler_of
from kvtune.tuner.solver import Solver
from kvtune.tuner.stagnation import PATIENCE, stagnates

if TYPE_CHECKING:
    import optuna

ROOM = "room"
Asked = tuple["optuna.Trial", dict[str, Any]]
"""A trial that was begun, and what it chose."""


def run_study(
    solver: Solver,
    *,
    trials: int,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    sampler: Sampler = "tpe",
    found: Callable[[Candidate], None] = lambda _: None,
    jobs: int = 1,
) -> list[Candidate]:
    """Search; every finished trial's candidate, in order.

    It ends before all trials are done where the front has stopped to grow.

    Args:
        solver: the question.
        trials: how many in all, those found in the journal included.
        seed: of the sampler; the same seed gives the same candidates, interrupted or not.
        journal: file that finished trials are recorded to and resumed from.
        progress: told of every trial.
        sampler: which proposes the trials.
        found: told of every candidate, those of the journal first.
        jobs: trials that are asked for before any of them is told, and answered side by side. How
            many they are is part of what decides the candidates.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    progress = progress or Silent()
    brain = optuna.create_study(directions=list(solver.question.objectives))
    record = Journal(journal, progress)
    study = _Study(brain, solver, record, sampler, seed)
    numbers = _numbers(len(record.trials), trials, progress)
    candidates: list[Candidate] = []
    with ThreadPoolExecutor(jobs) as threads:
        while batch := list(islice(numbers, jobs)):
            if batch[-1] >= len(record.trials) and stagnates(candidates):
                progress.note(f"stopped after {batch[0]} trials: the last {PATIENCE} added nothing")
                break
            asked = [study.ask(number) for number in batch]
            answers = threads.map(lambda each: solver.answer(each[0].number, each[1]), asked)
            for one, candidate in zip(asked, answers, strict=True):
                study.tell(one, candidate)
                if candidate is not None:
                    candidates.append(candidate)
                    found(candidate)
    return candidates


def _numbers(known: int, trials: int, progress: Progress) -> Iterator[int]:
    """Numbers of the trials: those of the journal, then, with a bar, those that remain."""
    yield from range(known)
    remaining = range(known, trials)
    yield from progress.track(remaining, "searching", len(remaining))


@dataclass
class _Study:
    """A study's trials, begun in order and reported to Optuna in order.

    Args:
        brain: Optuna's, in memory.
        solver: the question.
        journal: trials that are known begin with what they had chosen; new ones are recorded.
        sampler: which proposes the others.
        seed: of the sampler.
    """

    brain: optuna.Study
    solver: Solver
    journal: Journal
    sampler: Sampler
    seed: int
    _has_defaults: bool = field(default=False, init=False)

    def ask(self, number: int) -> Asked:
        """Begin a trial: as it was recorded, else as defaults and then the sampler propose."""
        with warnings.catch_warnings():
            if number < len(self.journal.trials):
                warnings.simplefilter("ignore")  # of choices out of range, which are refused below
                self.brain.enqueue_trial(self.journal.trials[number].parameters)
            elif not self._has_defaults:
                enqueue_defaults(self.brain, self.solver.question, skip=number)
                self._has_defaults = True
            self.brain.sampler = sampler_of(self.sampler, self.seed, number)
            trial = self.brain.ask()
            _ = trial.relative_params  # NSGA-II overlooks parents whose proposals nobody looked at
            return trial, suggest(trial, self.solver.question)

    def tell(self, asked: Asked, candidate: Candidate | None) -> None:
        """End a trial; one whose options cannot fit has no values, but says how far they miss.

        Raises:
            KvtuneError: this question's trials cannot choose what was recorded.
        """
        from optuna.trial import TrialState

        trial, _ = asked
        _tell_limits(asked, candidate, self.solver)
        if candidate is None:
            self.brain.tell(trial, state=TrialState.PRUNED)
        else:
            self.brain.tell(trial, _values(candidate, self.solver.question))
        ended, number = _recorded(self.brain.trials[trial.number]), trial.number
        if number >= len(self.journal.trials):
            self.journal.add(ended)
        elif ended != self.journal.trials[number]:
            raise KvtuneError(
                f"trial {number} does not belong to this search",
                where=str(self.journal.path),
                hint="remove the file; the same search then begins anew.",
            )


def values_of(trial: optuna.Trial, solver: Solver) -> list[float] | None:
    """A trial's values, its limits told to the sampler; None where its options cannot fit."""
    parameters = suggest(trial, solver.question)
    candidate = solver.answer(trial.number, parameters)
    _tell_limits((trial, parameters), candidate, solver)
    return None if candidate is None else _values(candidate, solver.question)


def _tell_limits(asked: Asked, candidate: Candidate | None, solver: Solver) -> None:
    """By which share of each limit a trial is beyond it, the room for its caches among them."""
    trial, parameters = asked
    if candidate is None:
        trial.set_constraint(ROOM, solver.beyond_room(parameters))
        return
    for name, by in candidate.excess.items():
        trial.set_constraint(name, by)


def _values(candidate: Candidate, question: Question) -> list[float]:
    """What the question's objectives are of a candidate."""
    several = len(question.freed) > 1
    return [
        candidate.kl,
        *([float(candidate.tokens_at_once)] if "maximize" in question.objectives else []),
        *([float(candidate.freed_bytes)] if several else []),
    ]


def _recorded(trial: optuna.trial.FrozenTrial) -> Trial:
    state: Literal["complete", "failed"] = "complete" if trial.values else "failed"
    return Trial(trial.number, state, dict(trial.params))
