"""Eight workers on one PostgreSQL study: rate, and trials lost or done twice when some are killed.

    python benchmarks/many_workers.py --out benchmarks/results/many-workers-cpu.json
    python benchmarks/many_workers.py --trials 40 --workers 3 --kill 1 --sleep 0.2 --out /tmp/w.json

A trial sleeps. ``--kill`` workers are killed with SIGKILL while they work, and others take their
places. Needs PostgreSQL's programs (Debian: postgresql) and psycopg (``kvtune[workers]``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.tests.postgres import postgres
from kvtune.tuner.shared_study import Patience, create, finished, open_storage, work

PATIENCE = Patience(heartbeat_s=2, grace_s=12, poll_s=0.5)


def worker(url: str, name: str, sleep_s: float) -> None:
    """One worker's life."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=name, storage=open_storage(url, PATIENCE))

    def objective(trial: Any) -> list[float]:
        x = trial.suggest_float("x", 0, 1)
        time.sleep(sleep_s)
        return [x]

    work(study, objective, lambda slot: optuna.samplers.RandomSampler(seed=slot), PATIENCE)


def run(url: str, name: str, arguments: argparse.Namespace, kill: int) -> dict[str, Any]:
    """Run one study with ``arguments.workers`` workers, ``kill`` of which are killed meanwhile."""
    storage = open_storage(url, PATIENCE)
    study = create(storage, name, arguments.trials, ["minimize"])
    spawn = multiprocessing.get_context("spawn")

    def start() -> Any:
        process = spawn.Process(target=worker, args=(url, name, arguments.sleep))
        process.start()
        return process

    processes = [start() for _ in range(arguments.workers)]
    wait_for_first(study)
    began, killed, rng = time.monotonic(), 0, random.Random(0)  # noqa: S311
    expected = arguments.trials * arguments.sleep / arguments.workers
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        due = expected * (killed + 1) / (kill + 2)
        if killed < kill and time.monotonic() - began > due:
            victim = rng.randrange(len(processes))
            if processes[victim].is_alive():
                os.kill(processes[victim].pid, signal.SIGKILL)
                killed += 1
                processes[victim] = start()
    return outcome(study, arguments, killed)


def wait_for_first(study: Any) -> None:
    """Until a first trial runs: starting Python is no part of a rate."""
    from optuna.trial import TrialState

    while not study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE)):
        time.sleep(0.1)


def outcome(study: Any, arguments: argparse.Namespace, killed: int) -> dict[str, Any]:
    """Slots that were done, how often, and the rate between the first start and the last end."""
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    times = Counter(t.system_attrs.get("retry_history", [t.number])[0] for t in done)
    seconds = max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)
    rate = len(times) / seconds.total_seconds()
    return {
        "workers": arguments.workers,
        "trials": arguments.trials,
        "trial_s": arguments.sleep,
        "killed": killed,
        "lost": arguments.trials - len(finished(study)),
        "done_twice": sum(count > 1 for count in times.values()),
        "put_back": sum(trial.state.name == "FAIL" for trial in trials),
        "seconds": seconds.total_seconds(),
        "times_one_worker": rate * arguments.sleep,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kill", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    with postgres() as url:
        for name, kill in (("all live", 0), ("some are killed", arguments.kill)):
            found[name] = run(url, name, arguments, kill)
            write_json(arguments.out, found)
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
