"""Runs of vLLM on an H200, stock and under a plan, beside what serve-sim predicts of them.

    python benchmarks/serve_sim_vllm.py --out benchmarks/results/serve-sim-vllm.json

``results/vllm-gpu-admission-h200.json`` (and, before a share of the blocks was left to answers,
``vllm-gpu-graphs-h200.json``) has what ``vllm_gpu.py`` measured: a model of 8 B, lengths
of a public trace, as many requests at once as are allowed. Each load is simulated with vLLM's
kernels (the extra ``aiconfigurator``), the plan as kvtune's plugin runs it. Nothing is fitted on
these runs but the share of the blocks that is left to answers, which was chosen by their trace.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from vllm_gpu import SHAPES, TIGHT_GIB, fitting_lengths
from vllm_plugin import LONGEST, document

from kvtune.common.estimate import exact
from kvtune.common.files import write_json
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.serving.engine import Engine
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.scheduler import Scheduler
from kvtune.simulator.serving.server import Server, StackKernels, server
from kvtune.simulator.serving.step import Limits
from kvtune.simulator.serving.times import prepare

RESULTS = Path(__file__).parent / "results"
REQUESTS = 400
KEYS = ("generated_a_second", "ended_a_second")


@dataclass(frozen=True)
class Load:
    """What was asked of vLLM.

    Args:
        gib: of its cache.
        at_once: requests.
        seconds: for which it was watched.
    """

    gib: float
    at_once: int
    seconds: float


LOADS = {
    "tight": Load(TIGHT_GIB, 256, 20.0), "short": Load(4.0, 256, 20.0), "ample": Load(4.0, 8, 10.0),
}  # fmt: skip


def served(serving: Server, load: Load, policy: Policy | None) -> dict[str, float]:
    """What a load comes to while it was watched."""
    pairs = list(islice(cycle(fitting_lengths()), REQUESTS))
    prompts, answers = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    asked = Requests(np.zeros(REQUESTS), prompts, answers, at_once=load.at_once)
    with_memory = replace(serving, cache=exact(int(load.gib * 2**30), "B"))
    ready = prepare(with_memory, asked, policy)
    blocks = int(with_memory.cache.value) // ready.block_bytes
    memory = Memory(ready.footprint, with_memory.block_tokens, blocks)
    scheduler = Scheduler(memory, ready.times["value"], ready.limits or with_memory.limits)
    record = Engine(asked, scheduler, LONGEST).run()
    return {
        **watched(record, answers, load.seconds),
        "most_at_once": record.peak_running, "preempted_of_all": record.counts.preemptions,
    }  # fmt: skip


def watched(record: Record, answers: Any, seconds: float) -> dict[str, float]:
    """Tokens and ended requests a second in the first seconds of a run."""
    first, done = np.array(record.first_s), np.array(record.finished_s)
    share = np.clip((seconds - first) / np.maximum(done - first, 1e-9), 0.0, 1.0)
    said = np.where(first <= seconds, 1 + share * (answers - 1), 0.0)
    return {
        "generated_a_second": round(float(said.sum()) / seconds, 1),
        "ended_a_second": round(float(np.sum(done <= seconds)) / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape, gpu = find_model("llama-8b"), find_gpu("h200")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES["8b"] | {"head_dim": 128}))
        policy = document(folder).policy
    limits = Limits(256, LONGEST)
    serving = server(shape, gpu, gpu.visible_bytes, "bf16", limits, kernels=StackKernels("vllm"))
    nothing_left = replace(serving, limits=replace(limits, left_to_answers=0.0))
    measured = json.loads((RESULTS / "vllm-gpu-admission-h200.json").read_text("utf-8"))
    before = json.loads((RESULTS / "vllm-gpu-graphs-h200.json").read_text("utf-8"))
    measured["plan, nothing left to answers"] = before["plan"]
    ways: dict[str, tuple[Server, Policy | None]] = {
        "stock": (serving, None), "plan": (serving, policy),
        "plan, nothing left to answers": (nothing_left, policy),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for way, (each, plan) in ways.items():
        for name, load in LOADS.items():
            predicted = served(each, load, plan)
            told: dict[str, Any] = {"predicted": predicted}
            if known := measured.get(way, {}).get(name):
                told["measured"] = {key: known[key] for key in (*KEYS, "most_at_once")}
                told["off"] = {key: round(predicted[key] / known[key] - 1, 4) for key in KEYS}
            found[f"{way}, {name}"] = told
            print(way, name, json.dumps(told))
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
