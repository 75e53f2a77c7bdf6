"""A search whose trials are shared: what it leaves for workers, and what a worker does with it.

A worker needs neither the model nor a GPU: a trial is answered from the search's tables, which lie
in the run directory beside the question and the storage's address.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.common.bounds import Count, Digest, Name
from kvtune.common.errors import KvtuneError
from kvtune.common.files import sha256, write_json
from kvtune.common.progress import Silent
from kvtune.common.stored import checked, read_json
from kvtune.simulator.quality.tables_file import load_tables, save_tables
from kvtune.tuner import source_models
from kvtune.tuner.journal import Journal, Trial
from kvtune.tuner.proposals import enqueue_defaults
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.samplers import Sampler, sampler_of
from kvtune.tuner.shared_study import create, finished, open_storage, work
from kvtune.tuner.solver import Solver
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.study import values_of

if TYPE_CHECKING:
    import optuna

SHARED, TABLES = "shared.json", "tables.safetensors"


@dataclass(frozen=True)
class Shared:
    """``shared.json``: what a worker has to know.

    Args:
        format: of this file.
        storage: URL of the database or the proxy.
        study: its name there.
        trials: of the study.
        sampler: which proposes them.
        seed: of the sampler.
        objectives: directions of the values.
        tables: sha256 of the tables beside it.
        request: what was asked, as plain data.
    """

    format: Count
    storage: Name
    study: Name
    trials: Count
    sampler: Sampler
    seed: int
    objectives: tuple[Name, ...]
    tables: Digest
    request: dict[str, Any]


def publish(
    request: SearchRequest, solver: Solver, study: str, trials: int, sampler: Sampler
) -> Shared:
    """Leave everything in the run directory that workers need."""
    folder = request.run_dir
    save_tables(solver.question.tables, folder / TABLES, {})
    asked = asdict(replace(request, shape=None, gpu=None))  # type: ignore[arg-type]
    asked |= {"shape": request.shape.name, "gpu": request.gpu.slug}
    shared = Shared(
        format=1,
        storage=str(request.storage),
        study=f"kvtune {study}",
        trials=trials,
        sampler=sampler,
        seed=request.seed,
        objectives=solver.question.objectives,
        tables=sha256(folder / TABLES),
        request=json.loads(json.dumps(asked, default=str)),
    )
    write_json(folder / SHARED, asdict(shared))
    return shared


def share(shared: Shared, solver: Solver, journal: Path) -> None:
    """Do the study's trials together with whoever joins, and record all of them in the journal."""
    study = create(open_storage(shared.storage), shared.study, shared.trials, shared.objectives)
    if not study.get_trials(deepcopy=False):
        enqueue_defaults(study, solver.question, skip=0)
    _work(study, shared, solver)
    journal.unlink(missing_ok=True)
    record = Journal(journal, Silent())
    for number, trial in enumerate(finished(study).values()):
        record.add(Trial(number, "complete" if trial.values else "failed", dict(trial.params)))


def join(folder: Path, solver_of: Callable[[SearchRequest, QualitySource], Solver]) -> int:
    """Work for the search that runs in a folder, until its trials are done; how many here.

    Raises:
        KvtuneError: no search shares its trials there, or its tables have changed.
    """
    path = folder / SHARED
    if not path.is_file():
        raise KvtuneError(
            "no search shares its trials here",
            where=str(folder),
            hint="start one with kvtune search --storage URL --run-dir DIR, and name its DIR.",
        )
    shared = checked(Shared, read_json(path), str(path))
    if sha256(folder / TABLES) != shared.tables:
        raise KvtuneError("these tables are of another search", where=str(folder / TABLES))
    source = QualitySource(load_tables(folder / TABLES)[0], source_models.packaged_calibration())
    solver = solver_of(_request(shared, folder), source)
    study = create(open_storage(shared.storage), shared.study, shared.trials, shared.objectives)
    return _work(study, shared, solver)


def _work(study: optuna.Study, shared: Shared, solver: Solver) -> int:
    return work(
        study,
        lambda trial: values_of(trial, solver),
        lambda number: sampler_of(shared.sampler, shared.seed, number),
    )


def _request(shared: Shared, folder: Path) -> SearchRequest:
    """The search's request, as far as its trials depend on it."""
    from kvtune.profiles.gpus import find_gpu
    from kvtune.tuner.limits import Limits
    from kvtune.tuner.target import read_model

    asked = dict(shared.request)
    asked |= {"shape": read_model(asked["model"])[1], "gpu": find_gpu(asked["gpu"])}
    asked |= {"run_dir": folder, "limits": Limits(**asked["limits"])}
    asked |= {name: tuple(map(Path, asked[name])) for name in ("texts", "starts")}
    return SearchRequest(**asked)
