"""Eight workers on one PostgreSQL study: rate, and trials lost or done twice when some are killed.

    python benchmarks/many_workers.py --out benchmarks/results/many-workers-1s-cpu.json
    python benchmarks/many_workers.py --sleep 3 --alone 20 --crews "one worker" "some are killed" \
        --out benchmarks/results/many-workers-cpu.json
    python benchmarks/many_workers.py --trials 300 --alone 20 --crews "one worker" \
        "some are killed" --out benchmarks/results/many-workers-processor-cpu.json
    python benchmarks/many_workers.py --trials 40 --workers 3 --kill 1 --sleep 0.2 --out /tmp/w.json

A trial sleeps. First one worker alone does ``--alone`` trials, whose rate the others are held
against; then ``--workers`` do ``--trials``; then they do as many again while ``--kill`` of them are
killed with SIGKILL, each within a trial, and others take their places. The clock begins when every
worker is ready, because starting Python is no part of a rate. On a machine that does other work,
the processor time of a trial, of the server and of workers that were not killed, says how many
cores all of them need. Needs PostgreSQL's programs (Debian: postgresql) and psycopg
(``kvtune[workers]``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.tests.postgres import postgres
from kvtune.tuner.shared_study import Patience, create, finished, open_storage, slot_of, work

CREWS = ("one worker", "all live", "some are killed")
SPENT = "spent"  # folder: processor seconds and trials of each worker that ended by itself
PATIENCE = Patience(heartbeat_s=2, grace_s=12, poll_s=0.5)


def worker(url: str, name: str, sleep_s: float, gate: Path) -> None:
    """One worker's life; it is ready when its file lies in ``gate``, and begins with ``go``.

    While a trial sleeps the file holds its number, so that a kill can be aimed at one.
    """
    import optuna

    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study = optuna.load_study(study_name=name, storage=open_storage(url, PATIENCE))
    mine = gate / str(os.getpid())
    mine.touch()
    while not (gate / "go").exists():
        time.sleep(0.05)

    def objective(trial: Any) -> list[float]:
        x = trial.suggest_float("x", 0, 1)
        mine.write_text(str(trial.number))
        time.sleep(sleep_s)
        mine.write_text("")
        return [x]

    started = time.process_time()
    done = work(study, objective, lambda slot: optuna.samplers.RandomSampler(seed=slot), PATIENCE)
    spent = gate / SPENT / str(os.getpid())
    spent.write_text(f"{time.process_time() - started} {done}")


def run(
    url: str, name: str, workers: int, trials: int, sleep_s: float, kill: int = 0
) -> dict[str, Any]:
    """Run one study with ``workers`` workers and kill ``kill`` of them while it runs."""
    study = create(open_storage(url, PATIENCE), name, trials, ["minimize"])
    spawn = multiprocessing.get_context("spawn")
    before = server_s(url)
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder)
        (gate / SPENT).mkdir()

        def start() -> Any:
            process = spawn.Process(target=worker, args=(url, name, sleep_s, gate))
            process.start()
            return process

        processes = [start() for _ in range(workers)]
        while len(list(gate.iterdir())) < workers + 1:
            time.sleep(0.1)
        (gate / "go").touch()
        killed: list[int] = []
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            if len(killed) < kill and begun(gate) >= trials * (len(killed) + 1) // (kill + 2):
                victim = next(p for p in processes if in_trial(gate, p) is not None)
                killed.append(in_trial(gate, victim) or 0)
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                (gate / str(victim.pid)).unlink()
                processes[processes.index(victim)] = start()
        for process in processes:
            process.join()
        told = [path.read_text().split() for path in (gate / SPENT).iterdir()]
    theirs = sum(float(spent) for spent, _ in told) / sum(int(done) for _, done in told)
    each = theirs + (server_s(url) - before) / trials
    found = outcome(study, trials, workers, killed)
    return found | {
        "processor_s_a_trial": each,
        "cores_that_all_workers_need": workers * each / (sleep_s + each),
    }


def server_s(url: str) -> float:
    """Processor seconds of the server and of its processes that have ended."""
    folder = Path(url.partition("host=")[2]) / "data"
    number = (folder / "postmaster.pid").read_text().split()[0]
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def in_trial(gate: Path, process: Any) -> int | None:
    """Number of the trial that a living worker sleeps in."""
    path = gate / str(process.pid)
    number = path.read_text() if process.is_alive() and path.exists() else ""
    return int(number) if number else None


def begun(gate: Path) -> int:
    """The largest number of a trial that sleeps now."""
    numbers = [path.read_text() for path in gate.iterdir() if path.name not in ("go", SPENT)]
    return max((int(number) for number in numbers if number), default=0)


def outcome(study: Any, trials: int, workers: int, killed: list[int]) -> dict[str, Any]:
    """Slots that were done, how often, and the rate between the first start and the last end."""
    seen = study.get_trials(deepcopy=False)
    done = [trial for trial in seen if trial.state.name == "COMPLETE"]
    times = Counter(slot_of(trial) for trial in done)
    seconds = max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)
    return {
        "workers": workers,
        "trials": trials,
        "killed_within_trials": killed,
        "lost": trials - len(finished(study)),
        "done_twice": sum(count > 1 for count in times.values()),
        "put_back": sum(trial.state.name == "FAIL" for trial in seen),
        "seconds": seconds.total_seconds(),
        "trials_per_second": len(times) / seconds.total_seconds(),
        "load_average_at_end": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=60)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kill", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=1.0)
    parser.add_argument("--crews", nargs="+", choices=CREWS, default=list(CREWS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"trial_s": arguments.sleep, "cores": os.cpu_count()}
    crews = (
        (1, arguments.alone, 0),
        (arguments.workers, arguments.trials, 0),
        (arguments.workers, arguments.trials, arguments.kill),
    )
    with postgres() as url:
        for name, (workers, trials, kill) in zip(CREWS, crews, strict=True):
            if name not in arguments.crews:
                continue
            part = run(url, name, workers, trials, arguments.sleep, kill)
            rate = found.get("one worker", part)["trials_per_second"]
            found[name] = part | {"times_one_worker": part["trials_per_second"] / rate}
            write_json(arguments.out, found)
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
