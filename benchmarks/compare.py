"""The tuner beside NSGA-II on live runs, random draws, greedy and an integer program, on a GPU.

    python benchmarks/compare.py --each 100 --seconds 330 --out benchmarks/results/compare-h200.json
    python benchmarks/compare.py --strategies tuner nsga2 greedy layers
    python benchmarks/compare.py --device cpu --tiny --each 20 --seconds 200 --out /tmp/compare.json

What ``kvtune compare`` does, with samples of its own sizes: SmolLM2, plans of 6 and 12 % of the
bf16 bytes, ``--each`` seconds for every strategy at every size, trace and tables counted where they
are read. A fault in one strategy is recorded and the rest goes on; what is done when ``--seconds``
are over is what is written.
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
from kvtune.tuner.compare.run import CompareRequest, comparison
from kvtune.tuner.compare.setting import prepare
from kvtune.tuner.compare.strategies import STRATEGIES
from kvtune.tuner.compare.written import as_plain
from kvtune.tuner.search_options import weights_request

SHARES = (0.06, 0.12)
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
    found: dict[str, Any] = {"device": device_name(arguments.device), "outcomes": [], "faults": []}
    found |= {"samples": workload.describe(), "each_s": arguments.each}
    for share in SHARES:
        left = list(arguments.strategies)
        while left and time.monotonic() < until:
            request = CompareRequest(search, (share,), arguments.each, tuple(left))
            done: list[dict[str, Any]] = []
            try:
                for part in comparison(request, source, prepared, progress):
                    plain = as_plain(part)
                    done = plain["outcomes"]
                    write_json(arguments.out, found | {f"at {share}": plain})
                    if time.monotonic() > until:
                        break
                left = []
            except Exception as error:
                fault = left[len(done)]
                found["faults"].append(f"{fault} at {share}: {type(error).__name__}: {error}")
                print(found["faults"][-1], file=sys.stderr)
                left = ["tuner", *left[len(done) + 1 :]] if fault != "tuner" else left[1:]
            if done:
                found[f"at {share}"] = plain
    return found


def device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
