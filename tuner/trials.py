"""The study of a search: its trials, drawn here or by workers on other machines too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvtune.common.progress import Progress
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.samplers import Sampler, choose
from kvtune.tuner.solver import Solver
from kvtune.tuner.study import run_study


def study_trials(
    request: SearchRequest,
    solver: Solver,
    facts: Facts,
    record: Callable[[Candidate], None],
    progress: Progress,
) -> tuple[list[Candidate], list[str]]:
    """The study's candidates, and why its sampler; none of a stand-in, where nothing is drawn."""
    if not facts.trials:
        return [], []
    sampler = choose(request.sampler, facts.trials)
    journal = request.run_dir / f"study-{facts.study}.journal"
    if request.storage:
        _share_trials(request, solver, facts, sampler.name, journal, progress)
    found = run_study(
        solver,
        trials=facts.trials,
        seed=request.seed,
        journal=journal,
        progress=progress,
        sampler=sampler.name,
        found=record,
        jobs=request.jobs,
    )
    return found, [f"sampler: {sampler.name}, because {sampler.reason}."]


def _share_trials(
    request: SearchRequest,
    solver: Solver,
    facts: Facts,
    sampler: Sampler,
    journal: Path,
    progress: Progress,
) -> None:
    """Let workers on other machines do some of the trials."""
    from kvtune.tuner.worker import publish, share

    shared = publish(request, solver, facts.study, facts.trials, sampler)
    progress.note(f"others can join: kvtune worker --study {request.run_dir}")
    share(shared, solver, journal)
