"""Predicted against measured decode steps and memory on the GPU of this machine.

    kvtune profile --out DIR --minutes 3
    python benchmarks/hardware_decode.py --profile DIR --out benchmarks/results/decode-h100.json

Llama-3.1-8B's shape with random bf16 weights, a plain decode loop with unmasked attention over a
cache of exactly the asked length, one CUDA graph a step. Predictions are made from the profile and
written to ``*-predictions.json`` before a model is made; what was measured comes after it, row by
row. Beside ours: the pure roofline, and 0.8 x bandwidth + 3 us an operation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks.decode_memory import decode_peak_bytes
from kvtune.benchmarks.rooflines import roofline_decode_steps, scaled_decode_steps
from kvtune.common.files import sha256, write_json
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.measured import KERNEL_FILE, MeasuredProfile, read_measured
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.kernels import kernels_of
from kvtune.simulator.latency.parts import decode_parts

POINTS = (  # batch, context; those that are no powers of two lie between the profile's points
    (1, 1024), (1, 8192), (1, 32768), (1, 100_000), (1, 131_072), (2, 3000), (2, 65536), (4, 1024),
    (4, 12_000), (4, 49_152), (8, 2048), (8, 8192), (8, 24_000), (16, 1024), (16, 5000),
    (16, 16384), (32, 1024), (32, 4096), (32, 10_000), (12, 6000), (24, 3000), (8, 65536),
    (32, 24_000), (4, 131_072),
)  # fmt: skip
SPARE_BYTES = 1500 * MIB


@dataclass(frozen=True)
class Prediction:
    """What is said before anything is measured. Seconds and bytes."""

    batch: int
    context: int
    held_out: bool
    cache_bytes: int
    peak_bytes: float
    step_s: float
    attention_s: float
    matrices_s: float
    rest_s: float
    between_s: float
    roofline_s: float
    scaled_s: float


def predict(
    profile: MeasuredProfile, gpu: GpuProfile, shape: ModelShape, batch: int, context: int
) -> Prediction:
    """One point from the profile alone."""
    kernels = kernels_of(profile)
    sequences, tokens = np.array(float(batch)), np.array(float(context))
    parts = decode_parts(kernels, shape, sequences, tokens)
    cache = shape.kv_bytes(context)
    heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
    return Prediction(
        batch=batch,
        context=context,
        held_out=(batch, context) not in kernels.attention_points(heads),
        cache_bytes=batch * cache,
        peak_bytes=decode_peak_bytes(shape, gpu, profile, batch, context).value,
        step_s=float(parts.total),
        attention_s=float(parts.attention),
        matrices_s=float(parts.matrices),
        rest_s=float(parts.rest),
        between_s=float(parts.between),
        roofline_s=float(roofline_decode_steps(shape, gpu, "bf16", batch, cache)),
        scaled_s=float(scaled_decode_steps(shape, gpu, "bf16", batch, cache)),
    )


def fitting(
    points: Sequence[tuple[int, int]], shape: ModelShape, device_bytes: int
) -> list[tuple[int, int]]:
    """Points whose weights and cache leave something spare."""
    weights = 2 * shape.parameters
    return [
        (batch, context)
        for batch, context in points
        if weights + batch * shape.kv_bytes(context) + SPARE_BYTES < device_bytes
    ]


def run(
    predictions: Sequence[Prediction],
    measure: Callable[[int, int], dict[str, Any]],
    write: Callable[[list[dict[str, Any]]], None],
    seconds: float,
) -> list[dict[str, Any]]:
    """Measure each point; what fails is told and the rest goes on; written after every point."""
    end, found = time.monotonic() + seconds, []
    for prediction in predictions:
        if time.monotonic() > end:
            print("time is up; the remaining points are left out")
            break
        try:
            measured = measure(prediction.batch, prediction.context)
        except Exception as error:
            measured = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        found.append({"predicted": asdict(prediction), "measured": measured})
        print(line(found[-1]), flush=True)
        write(found)
    return found


class GpuDecoder:
    """Weights once; a cache, a graph and its times for each point."""

    def __init__(self, shape: ModelShape) -> None:
        from kvtune.runtime.measure.monitor import open_monitor
        from kvtune.runtime.measure.plain_model import PlainDecoder

        self.monitor = open_monitor()
        self.model = PlainDecoder(shape, "cuda")

    def measure(self, batch: int, context: int) -> dict[str, Any]:
        """Seconds of a step, bytes of the cache and of the device."""
        import torch

        from kvtune.runtime.measure.timer import capture, samples, settle

        self.model.caches = []
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.model.hold(batch, context)
        replay = capture(self.model.step)
        settle(replay)
        times = samples(replay, 30) * 1e-6
        state = self.monitor.state()
        free, total = torch.cuda.mem_get_info()
        return {
            "step_s": float(np.median(times)),
            "p10_s": float(np.percentile(times, 10)),
            "p90_s": float(np.percentile(times, 90)),
            "runs": len(times),
            "cache_bytes": self.model.cache_bytes,
            "weight_bytes": self.model.weight_bytes,
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_bytes": total - free,
            "nvml_bytes": self.monitor.used_bytes(),
            "sm_mhz": state.sm_mhz,
            "throttle": state.throttle,
        }


def line(point: dict[str, Any]) -> str:
    """One point in a line, errors in per cent."""
    predicted, measured = point["predicted"], point["measured"]
    name = f"b{predicted['batch']:<3} {predicted['context']:>7}"
    if "failed" in measured:
        return f"{name}  failed: {measured['failed']}"
    errors = {
        key: 100 * (predicted[f"{key}_s"] / measured["step_s"] - 1)
        for key in ("step", "roofline", "scaled")
    }
    peak = (predicted["peak_bytes"] - measured["device_bytes"]) / MIB
    exact = predicted["cache_bytes"] == measured["cache_bytes"]
    return (
        f"{name}  {measured['step_s'] * 1e3:8.3f} ms  predicted {predicted['step_s'] * 1e3:8.3f}"
        f" ({errors['step']:+5.1f} %)  roofline {errors['roofline']:+6.1f} %"
        f"  0.8 x bandwidth {errors['scaled']:+6.1f} %  memory {peak:+7.0f} MiB"
        f"  KV bytes {'exact' if exact else 'DIFFER'}"
    )


def errors(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst errors, in per cent, of ours and of the baselines."""
    good = [point for point in points if "failed" not in point["measured"]]

    def shares(key: str, some: Sequence[dict[str, Any]]) -> list[float]:
        return [
            100 * abs(p["predicted"][key] / p["measured"]["step_s"] - 1) for p in some
        ]  # fmt: skip

    held = [point for point in good if point["predicted"]["held_out"]]
    found: dict[str, Any] = {"points": len(good), "held_out_points": len(held)}
    for key in ("step_s", "roofline_s", "scaled_s") if good else ():
        every = shares(key, good)
        found[key] = {"mape": float(np.mean(every)), "worst": max(every)}
    if held:
        found["held_out_median"] = float(np.median(shares("step_s", held)))
    if good:
        found["memory_worst_mib"] = max(
            abs(p["predicted"]["peak_bytes"] - p["measured"]["device_bytes"]) / MIB for p in good
        )
        found["cache_bytes_exact"] = all(
            p["predicted"]["cache_bytes"] == p["measured"]["cache_bytes"] for p in good
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    profile = read_measured(arguments.profile)
    gpu, shape = find_gpu(profile.slug), find_model("llama-8b")
    device_bytes = profile.bytes_of("memory_visible") or gpu.visible_bytes
    points = fitting(POINTS, shape, device_bytes)
    predictions = [predict(profile, gpu, shape, *point) for point in points]
    about = {
        "model": shape.name,
        "gpu": gpu.slug,
        "profile": asdict(profile.capture),
        "kernels_sha256": sha256(arguments.profile / KERNEL_FILE),
        "predicted_at": time.time(),
    }
    written = arguments.out.with_name(arguments.out.stem + "-predictions.json")
    write_json(written, about | {"predictions": [asdict(p) for p in predictions]})
    print(f"predictions written to {written}", flush=True)
    about["predictions_sha256"] = sha256(written)
    about["measured_from"] = time.time()
    decoder = GpuDecoder(shape)

    def write(found: list[dict[str, Any]]) -> None:
        write_json(arguments.out, about | {"errors": errors(found), "points": found})

    found = run(predictions, decoder.measure, write, arguments.seconds)
    print(json.dumps(errors(found), indent=2))


if __name__ == "__main__":
    main()
