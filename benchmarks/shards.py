"""Trace and tables over processes, one a GPU, beside one process: the same bits, and the seconds.

    python benchmarks/shards.py --engine processes:2 --device cuda \
        --out benchmarks/results/shards-h200-x2.json
    python benchmarks/shards.py --engine processes:2 --device cpu --tiny --out /tmp/shards.json

The engine is what ``kvtune search --engine`` takes; with several GPUs its work goes to them by
turns. All ways begin with the model's weights in the store and no trace. One process does it twice:
what differs then is the device's own.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvtune.common.files import write_json
from kvtune.common.progress import Silent
from kvtune.traces.models import load_model
from kvtune.traces.shards import CaptureJob
from kvtune.traces.trace import Trace
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.engines import built, captured
from kvtune.tuner.options import FULL, SMALL
from kvtune.tuner.sources import queries_of, signals_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--engine", default="processes:2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=6, help="of prose and of code each")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure(arguments)
    write_json(arguments.out, found)
    print(found)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    each = 1 if arguments.tiny else arguments.samples
    size = {"tokens": 160, "observed": 32} if arguments.tiny else {}
    workload = Workload({"search": {"prose": each, "code": each}}, **size)
    menu = replace(SMALL, shares=SMALL.shares[-2:]) if arguments.tiny else FULL
    found: dict[str, Any] = {
        "engine": arguments.engine, "device": loaded.device, "samples": 2 * each,
    }  # fmt: skip
    kept, traces = [], []
    with tempfile.TemporaryDirectory() as scratch:
        ways = (("one process", None), ("again", None), ("the engine", arguments.engine))
        for name, engine in ways:
            job = CaptureJob(
                model=arguments.model,
                dtype="float32",
                samples=tuple(build(workload, loaded.tokenizer)),
                folder=Path(scratch) / name,
                probes=4,
                queries=queries_of(menu.needs, workload.observed),
                signals=signals_of(menu.needs),
            )
            started = time.monotonic()
            trace = captured(job, loaded, engine, Silent())
            traced = time.monotonic()
            tables = built(trace, menu.options(), loaded.device, engine, Silent())
            kept.append(tables)
            traces.append(tensors_of(trace))
            found[name] = {"capture_s": traced - started, "tables_s": time.monotonic() - traced}
            print(name, found[name], file=sys.stderr, flush=True)
    one, *others = (tables.factor for tables in kept)
    for name, other in zip(("again", "the engine"), others, strict=True):
        found[name]["same_bits"] = one.tobytes() == other.tobytes()
        found[name]["largest_difference"] = float(abs(one - other).max())
    for name, digests in zip(("again", "the engine"), traces[1:], strict=True):
        apart = [key for key, digest in digests.items() if digest != traces[0][key]]
        found[name]["traced_tensors"] = len(digests)
        found[name]["traced_tensors_with_other_bits"] = sorted({key[-1] for key in apart})
    return found


def tensors_of(trace: Trace) -> dict[tuple[str, int, str], str]:
    """A digest of every tensor of a trace, by sample, layer and name."""
    return {
        (sample.id, layer, name): hashlib.sha256(bytes_of(tensor)).hexdigest()
        for sample in trace.samples
        for layer in range(trace.geometry.layers)
        for name, tensor in trace.layer(sample.id, layer).tensors.items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    main()
