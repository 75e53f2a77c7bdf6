"""All policies of the leaderboard by several processes that share one GPU, until the time is up.

    python benchmarks/leaderboard_runs.py --out runs --workers 6 --seconds 230
    python benchmarks/leaderboard_runs.py --out runs --device cpu --workers 1 --tiny
    python benchmarks/leaderboard.py --runs runs --device "one H200" \
        --out benchmarks/results/leaderboard-h200.json

Every task is ``kvtune bench`` of some policies on one sample; runs are added to the folder as they
come, and a folder that was begun is gone on with. Samples are taken by turns, so that kinds of text
have as many. Policies that take minutes a prompt come last and so have fewer runs: the table says
how many. Left out is what only says how all tokens are stored (``oscar``, ``weighted_keys``): in 16
bits that is the full cache. Policies that cannot run are named at the end.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import workers
from leaderboard import SLOW
from recorded_parts import say

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.bf16 import Bf16
from kvtune.traces.models import load_model
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import build, named_workload
from kvtune.tuner.bench import SHARES, bench
from kvtune.tuner.bench_entries import entries
from kvtune.tuner.bench_runs import Run, append_runs, open_runs

MODEL = "smollm2-135m"
STORES_ALL = ("oscar", "weighted_keys")
TOGETHER = 8  # policies of one task: they share what is computed of the prompt
LEFT_OVER_S = 5.0  # processes end


@dataclass(frozen=True)
class Task:
    """Some policies, by name, on one sample; runs are kept in a folder of the task's own."""

    sample: Sample
    names: tuple[str, ...]
    folder: Path

    @property
    def id(self) -> str:
        """The name by which messages refer to it."""
        return f"{self.sample.id}: {', '.join(self.names)}"


def done(task: Task, shares: Sequence[float]) -> tuple[list[Run], list[str]]:
    """The task's runs, and of policies that could not run why not.

    Of a process that died over it, some runs may be there already.
    """
    chosen = [entry for entry in entries(task.names) if entry.name in task.names]
    try:
        return bench(workers.loaded(), [task.sample], chosen, shares, task.folder), []
    except KvtuneError as error:
        if len(chosen) == 1:
            return [], [f"{task.id}: {error}"]
    runs, failures = list[Run](), list[str]()
    for entry in chosen:
        more, failed = done(replace(task, names=(entry.name,)), shares)
        runs, failures = runs + more, failures + failed
    return runs, failures


def tasks(
    samples: Sequence[Sample], known: Sequence[Run], scratch: Path, only: Sequence[str]
) -> list[Task]:
    """What is not known yet: quick policies on all samples, then slow ones."""
    there = {(run.sample, run.policy) for run in known}
    names = [entry.name for entry in entries(only) if entry.name not in STORES_ALL]
    quick, slow = ([n for n in names if (n in SLOW) == wanted] for wanted in (False, True))
    groups = [[quick[at : at + TOGETHER] for at in range(0, len(quick), TOGETHER)]]
    groups.append([[name] for name in slow])
    found = []
    for part in groups:
        for sample in by_turns(samples):
            for group in part:
                wanted = tuple(name for name in group if (sample.id, name) not in there)
                if wanted:
                    folder = scratch / f"{sample.id}-{wanted[0].replace(' ', '')}"
                    found.append(Task(sample, wanted, folder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=6, help="of each kind of text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="be done by then")
    parser.add_argument("--only", default="", help="some policies: snapkv,h2o")
    parser.add_argument("--tiny", action="store_true", help="one share of a short sample")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds - LEFT_OVER_S
    scratch = arguments.out / "scratch"
    place = workers.Place(MODEL, arguments.device, scratch)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(MODEL, dtype="float32")
        crew.model_is_stored()
        runs = open_runs(arguments.out, loaded, Bf16())
        samples, shares = samples_of(arguments, loaded.tokenizer), SHARES
        if arguments.tiny:
            samples, shares = samples[:1], SHARES[-1:]
        failures = crew.failures
        todo = tasks(samples, runs, scratch, [each for each in arguments.only.split(",") if each])
        for task, (found, failed) in crew.until(until, done, todo, shares):
            append_runs(arguments.out, found)
            failures += failed
            say(task.id, f"{len(found)} runs")
        say("failed:", *(failures or ["none"]))
    shutil.rmtree(scratch, ignore_errors=True)


def samples_of(arguments: argparse.Namespace, tokenizer: object) -> list[Sample]:
    """Held-out samples of the full workload, or one short one."""
    plan = named_workload("full", 0, ())
    kinds = dict.fromkeys(plan.counts["evaluate"], arguments.samples)
    size = {"tokens": 320, "observed": 64} if arguments.tiny else {}
    return build(replace(plan, counts={"evaluate": kinds}, **size), tokenizer)


if __name__ == "__main__":
    main()
