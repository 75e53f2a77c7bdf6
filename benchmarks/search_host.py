"""Processor seconds of what a search does beside the model, on tables of the full workload's size.

    python benchmarks/search_host.py --out benchmarks/results/search-host-cpu.json

38 samples, 170 options a head, 90 heads and 256 features as ``--workload full`` makes them for
SmolLM2, drawn at random: no model, no GPU. One trial is solved; every option for all heads is a
plan, which is recorded and calibrated anew as a search does; a family of baselines is filled.
``answers`` are hashes of what was found, so that two versions of kvtune can be held against each
other. Takes 2 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvtune.common.files import write_json
from kvtune.policies.paging import Growth, head_bytes
from kvtune.policies.slabs import growing_bytes
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.quality.tables import SampleFacts, Tables
from kvtune.traces.workloads import standard
from kvtune.tuner import source_models
from kvtune.tuner.answer import Found
from kvtune.tuner.baselines import candidates
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.record import Recorder
from kvtune.tuner.options import FULL
from kvtune.tuner.question import Question
from kvtune.tuner.refine import recalibrated
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.sources import QualitySource

CONTEXT, GENERATED, FEATURES = 8192, 256, 256
SHAPE = find_model("smollm2-135m")


def made_up(workload_samples: Sequence[SampleFacts]) -> Tables:
    """Random tables, one factor a sample, as replay leaves them."""
    heads, options = SHAPE.layers * SHAPE.kv_heads, FULL.options()
    size = (len(workload_samples), heads, len(options), FEATURES)
    factor = np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(1e-4)
    return Tables(
        SHAPE.name, SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, 1792, options,
        tuple(workload_samples), (factor**2).sum(-1), factor, np.arange(len(workload_samples)),
    )  # fmt: skip


def samples() -> list[SampleFacts]:
    """Those of the full workload, in its order."""
    return [
        SampleFacts(f"{split}-{kind}-{number}", split, kind)
        for split, kinds in standard().counts.items()
        for kind, count in kinds.items()
        for number in range(count)
    ]


def question(tables: Tables) -> Question:
    """A card with 2 GB for the cache."""
    generated = round(growing_bytes(GENERATED, SHAPE.head_dim))
    held = [
        head_bytes(o, o.budget.resolve(CONTEXT), CONTEXT, SHAPE.head_dim, Growth(GENERATED))
        for o in tables.options
    ]
    return Question(
        tables=tables,
        head_dim=SHAPE.head_dim,
        rooms={CONTEXT: 2 * 10**9},
        held={CONTEXT: np.array(held, np.int64) - generated},
        generated_bytes=generated * tables.heads,
        working=lambda _, __: 10**8,
        sequences=None,
    )


def facts(tables: Tables) -> Facts:
    kinds = tuple(sorted({sample.kind for sample in tables.samples}))
    return Facts(
        study="host", kvtune="", shape=SHAPE, gpu="h200", memory_bytes=10**10, weights="bf16",
        generated_tokens=GENERATED, largest_kl=0.02, trials=1, seed=0, source="own trace",
        stand_in="", kinds=kinds, selection_samples=8, held_out_samples=16, measured_tokens=1792,
        options=tables.options,
    )  # fmt: skip


def short_hash(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def measured(folder: Path) -> dict[str, Any]:
    tables = made_up(samples())
    source = QualitySource(tables, source_models.packaged_calibration())
    parts: dict[str, float] = {}
    begun = time.process_time()

    def part(name: str) -> None:
        nonlocal begun
        parts[name] = round(time.process_time() - begun, 2)
        begun = time.process_time()

    solver = Solver.of(question(tables))
    part("reducing the tables")
    chosen = dict.fromkeys(("snapkv", "h2o", "streaming_llm"), True)
    trial = solver.answer(0, {
        **chosen, "least_bits": 2, "split": "heads", "shrinkage": 0.4, "context": CONTEXT,
        "sequences": 60,
    })  # fmt: skip
    part("one trial")
    plans = simple_points(solver, first=0)
    part("one option for all heads, every option")
    recorder = Recorder(folder, facts(tables), source)
    for plan in plans:
        recorder.add(plan)
    part("recording them")
    request = SearchRequest(SHAPE.name, SHAPE, find_gpu("h200"), 10**10, folder)
    found = Found(request, {}, source, solver, "host", plans, ())
    again = recalibrated(found, source.calibration)
    part("calibrating them anew, once")
    size = SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim
    filled = candidates("uniform", 4_000_000, tables.prompt_tokens, *size)
    part("filling the uniform baselines")
    answers = {
        "trial": short_hash(cast(Any, trial).choice.tolist()),
        "plans": short_hash(recorder.path.read_text("utf-8").splitlines()[1:]),
        "calibrated": short_hash([plan.kl for plan in again.expected]),
        "baselines": short_hash(filled),
    }
    return {"plans": len(plans), "processor seconds": parts, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder))
    write_json(arguments.out, {"machine": platform.machine(), **found})


if __name__ == "__main__":
    main()
