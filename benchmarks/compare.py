"""The tuner beside NSGA-II on live runs, random draws, greedy and an integer program, on a GPU.

    python benchmarks/compare.py --each 100 --seconds 330 --out benchmarks/results/compare-h200.json
    python benchmarks/compare.py --strategies tuner nsga2 greedy layers
    python benchmarks/compare.py --device cpu --tiny --each 20 --seconds 200 --out /tmp/compare.json

What ``kvtune compare`` does, with samples of its own sizes: SmolLM2, plans of 6 and 12 % of the
bf16 bytes, ``--each`` seconds for every strategy at every size, trace and tables counted where they
are read. A fault in one strategy is recorded and the rest goes on. A strategy that would still run
when ``--seconds`` are over is judged by what it had by then, with the seconds that it had; the same
command with the same ``--scratch`` goes on where it stood, so that ten minutes of a strategy fit
into commands that end sooner. Two sizes on two GPUs are two commands:

    CUDA_VISIBLE_DEVICES=0 python benchmarks/compare.py --shares 0.06 --scratch kvtune-runs/c6 ...
    CUDA_VISIBLE_DEVICES=1 python benchmarks/compare.py --shares 0.12 --scratch kvtune-runs/c12 ...
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kvtune.common.files import write_json
from kvtune.common.progress import Bars
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload
from kvtune.tuner.compare.ledger import read_entries
from kvtune.tuner.compare.run import CompareRequest, comparison
from kvtune.tuner.compare.setting import prepare
from kvtune.tuner.compare.strategies import STRATEGIES
from kvtune.tuner.compare.written import as_plain
from kvtune.tuner.search_options import weights_request

SHARES = (0.06, 0.12)
JUDGING_S = 30  # for the plans that a strategy hands over, on the held-out samples
GPU = Workload(
    {
        "search": {"prose": 3, "code": 3, "retrieval": 3},
        "select": {"prose": 2, "code": 2, "retrieval": 2},
        "evaluate": {"prose": 5, "code": 5, "retrieval": 6},
    }
)
TINY = Workload(
    {split: {"prose": 1, "code": 1} for split in ("search", "select", "evaluate")},
    tokens=320,
    observed=24,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--each", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path("kvtune-runs/compare"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compare-h200.json"))
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    found = measure(arguments, until)
    write_json(arguments.out, found)


def measure(arguments: argparse.Namespace, until: float) -> dict[str, Any]:
    progress = Bars()
    search = weights_request(
        arguments.model, arguments.scratch, trials=12 if arguments.tiny else 60, menu="three"
    )
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    workload = TINY if arguments.tiny else GPU
    source, prepared = prepare(search, workload, loaded, progress)
    found: dict[str, Any] = {"device": device_name(arguments.device), "faults": []}
    found |= {"samples": workload.describe(), "each_s": arguments.each}
    for share in arguments.shares:
        left, outcomes = list(arguments.strategies), found.setdefault(f"at {share}", {})
        while left and time.monotonic() < until:
            name = left.pop(0)
            seconds = seconds_for(name, share, arguments, until)
            # The tuner's runs are on file by now: beside it another one is judged by its samples.
            names = tuple(dict.fromkeys(("tuner", name))) if "tuner" in outcomes else (name,)
            request = CompareRequest(search, (share,), seconds, names)
            try:
                *_, part = comparison(request, source, prepared, progress)
            except Exception as error:
                found["faults"].append(f"{name} at {share}: {type(error).__name__}: {error}")
                print(found["faults"][-1], file=sys.stderr)
                continue
            outcomes[name] = as_plain(part)["outcomes"][-1] | {"seconds": seconds}
            write_json(arguments.out, found)
    return found


def seconds_for(name: str, share: float, arguments: argparse.Namespace, until: float) -> float:
    """What a strategy gets in this command, beside what it has had in those before."""
    entries = read_entries(arguments.scratch / f"{100 * share:g}%" / f"{name}.jsonl")
    had = entries[-1].seconds if entries else 0.0
    return float(min(arguments.each, had + max(until - JUDGING_S - time.monotonic(), 0.0)))


def device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
