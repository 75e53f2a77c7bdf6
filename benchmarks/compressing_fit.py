"""Fits the rates of ``simulator/latency/compression.py`` on what compressing prompts took.

    python -m kvtune.benchmarks.compressing_fit results/compressing-h200.json [--out FILE]

The file is that of ``benchmarks/compressing.py``. The errors are relative, in logarithms, so that a
method which takes a millisecond counts as one that takes a second. Each method is also left out of
a fit in turn and predicted by it; that error is what the rates are worth for methods that nobody
measured. Differences below the noise of reading (1 % of it) are left out. Two
prefills under plans that were timed before, of many long prompts, hold every fit to what a busy
card does; most of the other cases wait for the host.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvtune.benchmarks.compressing import METHODS, Case, cases, predicted_ms
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import Method, find_method
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.compression import RATES, Rates, compression
from kvtune.simulator.latency.steps import prefill

NOISE = 0.01  # of what reading takes
ANCHORED = 2.0  # how much an error of a prefill under a plan counts


@dataclass(frozen=True)
class Point:
    """What one method took for each prompt of a case, in milliseconds."""

    case: Case
    method: str
    measured_ms: float

    def error(self, rates: Rates) -> float:
        """The logarithm of predicted over measured."""
        predicted, *_ = predicted_ms(self.case, find_method(self.method)(), rates)
        return float(np.log(predicted / self.measured_ms))


@dataclass(frozen=True)
class Prefill:
    """Prompts that were read under a plan on an H200, and what compressing each took.

    Args:
        model: a known shape.
        prompt_tokens: P of each.
        batch: prompts.
        summed: share of the layers whose heads need column sums; inferred. The rest need a window.
        measured_s: of one prompt.
    """

    model: str
    prompt_tokens: int
    batch: int
    summed: float
    measured_s: float

    def error(self, rates: Rates) -> float:
        """The logarithm of predicted over measured."""
        shape, gpu = find_model(self.model), find_gpu("h200")
        read = prefill(shape, gpu, "bf16", self.prompt_tokens, self.batch, "runtime")
        said = compression(self.policy, shape, gpu, self.prompt_tokens, read, self.batch, rates)
        return float(np.log(said.value / self.batch / self.measured_s))

    @cached_property
    def policy(self) -> Policy:
        """A fifth of the prompt kept in four bits, by H2O in some layers and SnapKV in the rest."""
        shape = find_model(self.model)
        some = round(self.summed * shape.layers)
        methods: list[Method] = [H2O()] * some + [SnapKV()] * (shape.layers - some)
        options = [Option(method, Budget(share=0.2), Int4(), Int4()) for method in methods]
        return Policy("plan", tuple((option,) * shape.kv_heads for option in options))


PREFILLS = (
    Prefill("smollm2-135m", 7936, 74, 1.0, 0.0197),
    Prefill("llama-3.1-8b", 8192, 41, 0.5, 0.082),
)


def points(found: dict[str, Any]) -> list[Point]:
    """The measurements of the file that exceed the noise."""
    return [
        Point(case, method, found[case.name][method]["measured"])
        for case in cases(tiny=False)
        if case.name in found
        for method in METHODS
        if _is_measured(found[case.name], method, case.batch)
    ]


def _is_measured(of_case: dict[str, Any], method: str, batch: int) -> bool:
    row = of_case.get(method)
    return isinstance(row, dict) and row["measured"] > NOISE * of_case["reading ms"] / batch


def fitted(chosen: Sequence[Point]) -> Rates:
    """The rates with the smallest errors, of which a few large ones do not decide."""

    def errors(logs: np.ndarray) -> np.ndarray:
        rates = Rates(*np.exp(logs).tolist())
        held = [ANCHORED * prefill.error(rates) for prefill in PREFILLS]
        return np.array([point.error(rates) for point in chosen] + held)

    start = np.log([RATES.bandwidth, RATES.compute, RATES.softmax, RATES.launch_s])
    room = np.log(30.0)
    ends = (start - room, np.minimum(start + room, [0.0, 0.0, 0.0, np.inf]))
    found = least_squares(errors, start, bounds=ends, loss="soft_l1", max_nfev=15)
    return Rates(*np.exp(found.x).tolist())


def left_out(every: Sequence[Point]) -> dict[str, list[float]]:
    """Predicted over measured of each method, by rates that were fitted on the others."""
    found = {}
    for method in dict.fromkeys(point.method for point in every):
        rates = fitted([point for point in every if point.method != method])
        found[method] = [float(np.exp(p.error(rates))) for p in every if p.method == method]
    return found


def shapes_left_out(every: Sequence[Point]) -> dict[str, list[float]]:
    """The same of each model; nothing where all points are of one."""
    names = list(dict.fromkeys(point.case.shape.name for point in every))
    found = {}
    for name in names if len(names) > 1 else ():
        rates = fitted([point for point in every if point.case.shape.name != name])
        own = [point for point in every if point.case.shape.name == name]
        found[name] = [float(np.exp(point.error(rates))) for point in own]
    return found


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Of predicted over measured: the median error, and how many are within a factor of 1.5."""
    logs = np.abs(np.log(ratios))
    return {
        "points": len(logs),
        "median error": round(float(np.expm1(np.median(logs))), 3),
        "within 1.5": round(float(np.mean(logs < np.log(1.5))), 3),
        "within 2": round(float(np.mean(logs < np.log(2.0))), 3),
        "within 2.5": round(float(np.mean(logs < np.log(2.5))), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="of compressing.py; cases of all")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    for file in asked.files:
        found |= json.loads(file.read_text(encoding="utf-8"))
    every = points(found)
    if len(every) < 8:
        raise SystemExit(f"there are {len(every)} measured points; 8 are the least")
    rates, others = fitted(every), left_out(every)
    shapes = shapes_left_out(every)
    told = {
        "rates": asdict(rates),
        "as they are": summary([float(np.exp(p.error(RATES))) for p in every]),
        "fitted": summary([float(np.exp(p.error(rates))) for p in every]),
        "each method left out": summary([ratio for each in others.values() for ratio in each]),
        "by method left out": others,
        "each shape left out": {shape: summary(ratios) for shape, ratios in shapes.items()},
    }
    print(json.dumps(told, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
