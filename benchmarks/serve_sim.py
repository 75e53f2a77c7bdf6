"""The request-level simulation held against queueing theory and against its time limit.

OMP_NUM_THREADS=2 python benchmarks/serve_sim.py --out benchmarks/results/serve-sim.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.files import write_json
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.serving.engine import Engine, serve
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.report import Goals
from kvtune.simulator.serving.requests import Lengths, Requests, generate
from kvtune.simulator.serving.scheduler import Scheduler
from kvtune.simulator.serving.sequence import Footprint
from kvtune.simulator.serving.server import server
from kvtune.simulator.serving.step import Limits
from kvtune.simulator.serving.step_times import Curve, StepTimes
from kvtune.simulator.serving.times import prepare

QUEUE_REQUESTS = 600_000
MEAN_STEPS = 1000  # of one service; exponential ones are rounded to whole steps
UTILISATIONS = (0.5, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve-sim.json"))
    parser.add_argument("--requests", type=int, default=1_000_000)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"command": "python benchmarks/serve_sim.py"}
    found["million"] = million(arguments.requests, 4.0, 40)
    print(json.dumps(found), flush=True)
    found["queues"] = [queue(kind, use) for kind in ("M/D/1", "M/M/1") for use in UTILISATIONS]
    write_json(arguments.out, found)
    print(json.dumps(found, indent=2))


def queue(kind: str, utilisation: float) -> dict[str, Any]:
    """Mean wait of an engine that serves one request at a time, beside the formula's."""
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(1 / utilisation, QUEUE_REQUESTS))
    steps = np.full(QUEUE_REQUESTS, MEAN_STEPS)
    if kind == "M/M/1":
        steps = np.ceil(rng.exponential(MEAN_STEPS, QUEUE_REQUESTS)).astype(np.int64)
    record = one_at_a_time(arrival, steps, 1 / MEAN_STEPS)
    waits = np.asarray(record.started_s) - arrival
    waited = float(np.mean(waits))
    theory = utilisation / (1 - utilisation) * (0.5 if kind == "M/D/1" else 1.0)
    return {
        "queue": kind,
        "utilisation": utilisation,
        "requests": QUEUE_REQUESTS,
        "mean_wait_in_services": waited,
        "theory": theory,
        "error": waited / theory - 1,
        "most_off_lindley": float(np.abs(waits - lindley(arrival, steps / MEAN_STEPS)).max()),
    }


def lindley(arrival: np.ndarray, service: np.ndarray) -> np.ndarray:
    """Exact waiting times of these very requests: what is left of the error is the sample's."""
    rise = np.cumsum(service[:-1] - np.diff(arrival))
    whole = np.concatenate([[0.0], rise])
    return whole - np.minimum.accumulate(np.minimum(whole, 0.0))


def one_at_a_time(arrival: np.ndarray, steps: np.ndarray, step_s: float) -> Record:
    """The engine with room for one sequence and steps that all take as long."""
    ones = np.ones(len(arrival), np.int64)
    requests = Requests(arrival, ones, steps)
    longest = int(steps.max()) + 1
    row = [[step_s]]
    times = StepTimes(
        prompts=Curve(1, 1, [1]),
        generated=Curve(0, 1, [0]),
        decode=[row, row],
        empty=[0.0, step_s],
        whole_pass=Curve(0, 1, [step_s, step_s]),
        compute=Curve(0, 1, [0.0, 0.0]),
        compressing=Curve(1, 1, [0.0]),
    )
    memory = Memory(Footprint([0, 1], [0, 1], 1), 16, longest // 16 + 2)
    return Engine(requests, Scheduler(memory, times, Limits(1, 1)), longest).run()


def million(count: int, rate: float, memory_gb: int) -> dict[str, Any]:
    """Wall-clock time of a run of Llama-3.1-8B on an H100, with likely times."""
    shape, gpu = find_model("llama-8b"), find_gpu("h100")
    begin, cpu = time.perf_counter(), time.process_time()
    requests = generate(
        count, rate, Lengths(2048, 2048, 0.5), Lengths(256, 256, 0.5), longest=32768
    )
    serving = server(shape, gpu, memory_gb * 10**9, "bf16", Limits(256, 2048))
    found = serve(prepare(serving, requests, None), requests, Goals(1.0, 0.05), ends=("value",))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "source": requests.source,
        "memory_gb": memory_gb,
        "requests": count,
        "finished": found.finished,
        "refused": sum(found.refused.values()),
        "steps": found.steps,
        "preemptions": found.preemptions,
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "ttft_p50_s": found.figures["ttft_p50"].value,
        "tpot_p50_s": found.figures["tpot_p50"].value,
        "goodput_requests_per_s": found.figures["goodput"].value,
    }


if __name__ == "__main__":
    main()
