"""KV tokens that vLLM printed, beside those that ``kvtune estimate --stack vllm`` says.

    python -m kvtune.benchmarks.engine_tokens [--out FILE]

``data/engine_tokens.csv`` holds what logs of vLLM printed: version, model, GPU, flags, "GPU KV
cache size" and "Available KV cache memory", with each log's address. Those marked ``fitted`` are
what the constants of ``simulator/memory/engine_releases.py`` were taken from; the others were left
out. Nothing that a log says of its weights or its profile run is given to the prediction.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from kvtune.cli.engine_args import read_engine_args
from kvtune.common.units import GIB
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.engine_memory import engine_memory
from kvtune.simulator.memory.weights import check_format

GOAL = 0.02


@dataclass(frozen=True)
class Row:
    """A log's figure beside ours: tokens where the log has them, else GiB of the cache."""

    name: str
    fitted: bool
    unit: str
    printed: float
    predicted: float
    low: float
    high: float
    source: str

    @property
    def off(self) -> float:
        """The relative error of the predicted number of tokens."""
        return self.predicted / self.printed - 1

    @property
    def covered(self) -> bool:
        """Whether the interval holds what was printed, rounded as it was printed."""
        slack = 0.005 if self.unit == "GiB" else 0.0
        return self.low - slack <= self.printed <= self.high + slack


def rows() -> list[Row]:
    """Every log of the table."""
    file = resources.files("kvtune.benchmarks") / "data" / "engine_tokens.csv"
    return [_row(record) for record in csv.DictReader(file.read_text().splitlines())]


def _row(record: dict[str, str]) -> Row:
    flags, _ = read_engine_args(record["flags"])
    gpus = int(record["gpus"])
    memory = engine_memory(
        find_model(record["model"]), find_gpu(record["gpu"]), check_format(record["weights"]),
        flags, record["version"], gpus,
    )  # fmt: skip
    tokens = bool(record["tokens"])
    ours, scale = (memory.tokens, 1) if tokens else (memory.cache, GIB)
    name = f"vLLM {record['version']}, {record['model']} {record['weights']}, "
    return Row(
        name=f"{name}{gpus} x {record['gpu']} {record['flags']}".strip(),
        fitted=record["fitted"] == "yes",
        unit="tokens" if tokens else "GiB",
        printed=float(record["tokens"] or record["gib"]),
        predicted=ours.value / scale,
        low=ours.low / scale,
        high=ours.high / scale,
        source=record["source"],
    )


def main() -> None:
    """Print the table and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = rows()
    print("| log | printed | predicted | off | inside | fitted |\n|---|---|---|---|---|---|")
    for row in found:
        figures = (f"{value:,.0f}" if row.unit == "tokens" else f"{value:.2f} GiB"
                   for value in (row.printed, row.predicted))  # fmt: skip
        told = ["yes" if flag else "no" for flag in (row.covered, row.fitted)]
        print("|", " | ".join([row.name, *figures, f"{100 * row.off:+.1f} %", *told]), "|")
    print()
    totals = {}
    for name, part in (("fitted", True), ("left out", False)):
        chosen = [row for row in found if row.fitted is part]
        totals[name] = summary(chosen)
        print(f"{name}: {totals[name]}")
    if out:
        out.write_text(json.dumps({"totals": totals, "rows": [asdict(r) for r in found]}, indent=1))


def summary(chosen: list[Row]) -> dict[str, float]:
    """How many, how many within the goal, median and worst error, how many inside."""
    errors = [abs(row.off) for row in chosen]
    return {
        "logs": len(chosen),
        "within 2 %": sum(error <= GOAL for error in errors),
        "median %": round(100 * statistics.median(errors), 2),
        "worst %": round(100 * max(errors), 1),
        "inside the interval": sum(row.covered for row in chosen),
    }


if __name__ == "__main__":
    main()
