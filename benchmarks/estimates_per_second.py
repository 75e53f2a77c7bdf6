"""How many decode-step estimates a second the latency model makes, from arrays.

OMP_NUM_THREADS=2 python benchmarks/estimates_per_second.py --gpu h100 [--out FILE]

Beside the rate by the clock stands that by the seconds of processor that were used, of one core:
on a machine that others use the clock says what they left.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.steps import decode_steps

COUNT = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape, gpu = find_model(arguments.model), find_gpu(arguments.gpu)
    rng = np.random.default_rng(0)
    batch = rng.integers(1, 64, COUNT)
    cache = rng.uniform(1e6, 1e9, (2, COUNT))
    decode_steps(shape, gpu, "bf16", batch[:10], {"bf16": cache[0][:10], "int4": cache[1][:10]})
    begin, used = time.perf_counter(), time.process_time()
    times = decode_steps(shape, gpu, "bf16", batch, {"bf16": cache[0], "int4": cache[1]})
    rate, alone = COUNT / (time.perf_counter() - begin), COUNT / (time.process_time() - used)
    print(
        f"{rate:,.0f} estimates a second, {alone:,.0f} a second of one core "
        f"({gpu.name}, tier {times.tier})"
    )
    if arguments.out:
        told = {
            "gpu": gpu.slug, "model": shape.name, "tier": times.tier, "estimates": COUNT,
            "a second": round(rate), "a second of one core": round(alone),
        }  # fmt: skip
        arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
