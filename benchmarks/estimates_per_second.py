"""How many decode-step estimates a second the latency model makes, from arrays.

OMP_NUM_THREADS=2 python benchmarks/estimates_per_second.py --gpu h100
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.steps import decode_steps

COUNT = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", default="llama-8b")
    arguments = parser.parse_args()
    shape, gpu = find_model(arguments.model), find_gpu(arguments.gpu)
    rng = np.random.default_rng(0)
    batch = rng.integers(1, 64, COUNT)
    cache = rng.uniform(1e6, 1e9, (2, COUNT))
    decode_steps(shape, gpu, "bf16", batch[:10], {"bf16": cache[0][:10], "int4": cache[1][:10]})
    begin = time.perf_counter()
    times = decode_steps(shape, gpu, "bf16", batch, {"bf16": cache[0], "int4": cache[1]})
    rate = COUNT / (time.perf_counter() - begin)
    print(f"{rate:,.0f} estimates a second ({gpu.name}, tier {times.tier})")


if __name__ == "__main__":
    main()
