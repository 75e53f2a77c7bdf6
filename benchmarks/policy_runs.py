"""Processor seconds of replaying and running live policies whose heads keep different numbers.

    python benchmarks/policy_runs.py --folder TRACE --out benchmarks/results/policy-runs-cpu.json

SmolLM2 on one thread, one sample of the small workload: eight policies that give every head an
option of the laptop's menu at random are replayed on all layers, the uniform baselines of so many
bytes on every sixth, and six of the random ones run live beside the uncompressed cache. The least
of ``--times`` runs counts; processor time, because other work may run beside it. ``losses`` are
those of the live runs and replays, so that two versions of kvtune can be held against each other.
The trace lies in ``--folder``, or is captured there.
"""

from __future__ import annotations

import argparse
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture_replay import timed

from kvtune.common.files import write_json
from kvtune.policies.policy import Policy
from kvtune.runtime.live import run_live
from kvtune.runtime.prompts import traced_prompt
from kvtune.simulator.quality.evaluate import replay_policies
from kvtune.traces.capture import capture
from kvtune.traces.models import load_model
from kvtune.traces.workloads import build, small
from kvtune.tuner.baselines import candidates
from kvtune.tuner.options import LAPTOP

LAYERS, HEADS, HEAD_DIM = 30, 3, 64
BYTES = 2_000_000


def drawn(count: int) -> list[Policy]:
    """Policies with an option of the menu for each head, by seed."""
    options, rng = LAPTOP.options(), np.random.default_rng(0)
    picked = rng.integers(0, len(options), (count, LAYERS, HEADS)).tolist()
    return [
        Policy(f"drawn {n}", tuple(tuple(options[o] for o in layer) for layer in each))
        for n, each in enumerate(picked)
    ]


def measured(times: int, folder: Path) -> dict[str, Any]:
    loaded = load_model("smollm2-135m")
    samples = build(small(), loaded.tokenizer)[:1]
    trace = capture(loaded, samples, folder, probes=4, queries=192, signals=("column_sums",))
    sample = trace.samples[0]
    uniform = candidates("uniform", BYTES, sample.prompt, LAYERS, HEADS, HEAD_DIM)
    eight, replay_s = timed(times, lambda: replay_policies(trace, trace.samples, drawn(8)))
    coarse, uniform_s = timed(
        times, lambda: replay_policies(trace, trace.samples, uniform, every=6)
    )
    prompt = cache(traced_prompt(trace, sample, "cpu", probes=False))
    runs, live_s = timed(times, lambda: run_live(loaded, sample, prompt, drawn(6)))
    seconds = {"replay of 8": replay_s, f"replay of {len(uniform)} uniform": uniform_s}
    seconds["live run of 6 and uncompressed"] = live_s
    return {
        "processor seconds": {name: round(value, 2) for name, value in seconds.items()},
        "losses": {
            "replay": eight[:, 0].tolist(),
            "uniform": coarse[:, 0].tolist(),
            "live": [float(run.kl.mean()) for run in runs],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(arguments.times, arguments.folder)
    write_json(arguments.out, {"machine": f"{platform.machine()}, one thread", **found})


if __name__ == "__main__":
    main()
