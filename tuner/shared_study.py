"""One study, many workers: trials in a database that every machine reaches, each done exactly once.

A worker begins the next trial until all have been begun. A trial whose worker died is found by its
heartbeat and waits to be done again, with the choices it had made. What is lost all the same, where
a worker died while it put such a trial back, is missing at the end and is put back then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    import optuna

TRIALS = "kvtune:trials"
AGAIN = "kvtune:again for"
GRPC = "grpc://"
Objective = Callable[["optuna.Trial"], "list[float] | None"]
"""Values of a trial; None where its choices cannot be answered."""


@dataclass(frozen=True)
class Patience:
    """When a worker counts as dead.

    Args:
        heartbeat_s: between two signs of life.
        grace_s: without one, until its trial waits again.
        poll_s: between two looks at the trials of others.
    """

    heartbeat_s: int = 5
    grace_s: int = 30
    poll_s: float = 1.0


_STORAGES = (
    "postgresql+psycopg://USER@HOST/DB (pip install 'kvtune[workers]'), sqlite:///FILE, or "
    "grpc://HOST:PORT."
)


def check_storage(url: str) -> None:
    """Refuse what is no database's URL; no connection is made.

    Raises:
        KvtuneError: it is none.
    """
    if not url.partition("://")[1]:
        raise KvtuneError(f"{url!r} is no URL of a database", where="--storage", hint=_STORAGES)


def open_storage(url: str, patience: Patience | None = None) -> optuna.storages.BaseStorage:
    """A database by its SQLAlchemy URL, or Optuna's gRPC proxy in front of one by ``grpc://``.

    Behind a proxy nobody sees heartbeats: a trial whose worker died there waits until a worker
    that reaches the database itself joins.

    Raises:
        KvtuneError: it is no such URL, its driver is not installed, or nobody answers there.
    """
    from optuna import storages

    patience = patience or Patience()
    try:
        if url.startswith(GRPC):
            host, _, port = url.removeprefix(GRPC).partition(":")
            return storages.GrpcStorageProxy(host=host, port=int(port or 13000))
        return storages.RDBStorage(
            url,
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=patience.heartbeat_s,
            grace_period=patience.grace_s,
            heartbeat_stale_trial_callback=lambda study, dead: study.add_trial(_again(dead)),
        )
    except Exception as error:  # SQLAlchemy's, the driver's own and Optuna's have no common base
        raise KvtuneError(
            f"this study's storage cannot be opened: {str(error).splitlines()[0]}",
            where=url,
            hint=_STORAGES,
        ) from error


def create(
    storage: optuna.storages.BaseStorage, name: str, trials: int, objectives: Sequence[str]
) -> optuna.Study:
    """The study of so many trials, new or as it stands."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=list(objectives), load_if_exists=True
    )
    study.set_user_attr(TRIALS, trials)
    return study


def work(
    study: optuna.Study,
    objective: Objective,
    sampler_of: Callable[[int], Any],
    patience: Patience | None = None,
) -> int:
    """Do trials until all are done, by whomever; how many of them were done here.

    Args:
        study: as ``create`` makes it.
        objective: of one trial.
        sampler_of: the sampler for a trial, by its number.
        patience: as of ``open_storage``.
    """
    import optuna

    patience, done, beyond = patience or Patience(), 0, False
    trials = study.user_attrs[TRIALS]

    def guarded(trial: optuna.Trial) -> list[float]:
        nonlocal done, beyond
        slot = _slot(study, trial, trials)
        if slot is None:
            beyond = True
            raise optuna.TrialPruned
        study.sampler = sampler_of(slot)
        values = objective(trial)
        done += 1
        if values is None:
            raise optuna.TrialPruned
        return values

    while True:
        try:
            study.optimize(guarded, n_trials=1)
        except optuna.exceptions.UpdateFinishedTrialError:
            done -= 1  # it took so long that it was given to another worker
        if beyond:
            beyond = False
            if not _more_to_do(study, patience):
                return done


def _slot(study: optuna.Study, trial: optuna.Trial, trials: int) -> int | None:
    """Which of the study's trials this is: its number, or that of the one it is done for again.

    None of a trial that is one too many: all have been begun. Trials are read for that only where
    the number leaves it open: reading them for each would be a fourth of a worker's time.
    """
    if AGAIN in trial.user_attrs:
        return int(trial.user_attrs[AGAIN])
    if trial.number < trials:
        return int(trial.number)
    new = [each.number for each in study.get_trials(deepcopy=False) if not _is_again(each)]
    number: int = trial.number
    return number if number in sorted(new)[:trials] else None


def _is_again(trial: optuna.trial.FrozenTrial) -> bool:
    return AGAIN in trial.user_attrs


def slot_of(trial: optuna.trial.FrozenTrial) -> int:
    """The number of the trial that this one is, or is done again for."""
    return int(trial.user_attrs.get(AGAIN, trial.number))


def _more_to_do(study: optuna.Study, patience: Patience) -> bool:
    """Wait for what others do; whether any of it has to be done again."""
    import optuna
    from optuna.trial import TrialState

    while True:
        optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        states = {trial.state for trial in trials}
        if TrialState.WAITING in states:
            return True
        if TrialState.RUNNING not in states:
            for slot in missing(study):
                study.add_trial(_again(trials[slot]))
            return bool(missing(study))
        time.sleep(patience.poll_s)


def _again(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """A trial that was lost, to be done with the choices that it had made."""
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={AGAIN: slot_of(trial)},
    )


def missing(study: optuna.Study) -> list[int]:
    """Numbers of the trials that were begun and that nobody has finished."""
    new = [each.number for each in study.get_trials(deepcopy=False) if not _is_again(each)]
    done = finished(study)
    return [number for number in sorted(new)[: study.user_attrs[TRIALS]] if number not in done]


def finished(study: optuna.Study) -> dict[int, optuna.trial.FrozenTrial]:
    """Each of the study's trials as it was first done, by number."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    new = sorted(each.number for each in trials if not _is_again(each))
    found: dict[int, optuna.trial.FrozenTrial] = {}
    for trial in trials:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            found.setdefault(slot_of(trial), trial)
    return {slot: found[slot] for slot in new[: study.user_attrs[TRIALS]] if slot in found}
