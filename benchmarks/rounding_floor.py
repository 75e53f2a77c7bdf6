"""What rounding alone makes of live losses in 16 bits, measured as a search measures it.

    python benchmarks/rounding_floor.py --out benchmarks/results/rounding-floor-cpu.json

Of each held-out sample of the small workload: KL of the uncompressed cache from itself in each of
the two ways that ``runtime/rounding.py`` runs it, and the live loss of int8, which in float32 is
far below that. ``--device cuda`` does the same on a GPU. Each sample is written as it ends.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from capture_replay import timed

from kvtune.common.files import write_json
from kvtune.policies.formats.grouped import Int8
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import run_beside_full
from kvtune.runtime.prompts import fresh_prompt
from kvtune.runtime.rounding import kl_of_rounding
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import build, small

TOGETHER = 6
"""Policies a batch, as many as a search on a CPU runs beside the uncompressed cache."""


def measured(loaded: LoadedModel, sample: Sample) -> dict[str, Any]:
    """Means over the observed tokens of one sample, nats a token."""
    shape = loaded.geometry.layers, loaded.geometry.kv_heads
    policy = Policy.uniform(Option(Full(), ALL, Int8(), Int8()), *shape)
    prompt = fresh_prompt(loaded, sample, Needs())
    full, runs = run_beside_full(loaded, sample, prompt, [policy] * TOGETHER)
    again, seconds = timed(1, lambda: kl_of_rounding(loaded, sample, prompt, full))
    whole, halves = again.mean(1).tolist()
    return {
        "sample": sample.id,
        "another batch": whole,
        "another batch, the prompt in halves": halves,
        "int8": float(runs[0].kl.mean()),
        "processor seconds of the pass": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=None, help="of the held-out ones; all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "device": arguments.device,
        "dtypes": {},
    }
    for dtype in arguments.dtypes:
        loaded = load_model("smollm2-135m", device=arguments.device, dtype=dtype)
        held_out = [s for s in build(small(), loaded.tokenizer) if s.split == "evaluate"]
        rows = found["dtypes"][dtype] = []
        for sample in held_out[: arguments.samples]:
            rows.append(measured(loaded, sample))
            write_json(arguments.out, found)


if __name__ == "__main__":
    main()
