"""How far the latency model reaches to GPUs that it has no measurement of.

    python benchmarks/hardware_elsewhere.py --results benchmarks/results \
        --out benchmarks/results/hardware-elsewhere.json

Leaving one out: a measured GPU's decode steps, of plain modules and of the runtime, are predicted
from another's profile and its own datasheet. Published: the datasheet tier alone against step
times that others published for GPUs of other kinds, with their sources, in
data/published_steps.csv. Beside ours every time: the pure roofline, and 0.8 x bandwidth + 3 us an
operation.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.benchmarks.rooflines import roofline_decode_steps, scaled_decode_steps
from kvtune.common.files import write_json
from kvtune.profiles.gpus import GpuProfile, find_gpu, list_gpus
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import MeasuredProfile, find_measured
from kvtune.profiles.models import find_model, model_of_size
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import Answer
from kvtune.simulator.latency.kernels import Kernels, kernels_of
from kvtune.simulator.latency.measured import measured_steps
from kvtune.simulator.latency.runtime import runtime_steps
from kvtune.simulator.latency.steps import decode_steps
from kvtune.simulator.latency.transfer import Tables, transferred

PUBLISHED = Path(__file__).parent / "data" / "published_steps.csv"


@dataclass(frozen=True)
class Compared:
    """A measured step beside what is predicted. Seconds."""

    gpu: str
    batch: int
    context: int
    measured_s: float
    ours_s: float
    low_s: float
    high_s: float
    roofline_s: float
    scaled_s: float
    source: str

    @property
    def inside(self) -> bool:
        return self.low_s <= self.measured_s <= self.high_s

    def error(self, key: str) -> float:
        """Relative, in per cent, with its sign."""
        return 100 * (float(getattr(self, key)) / self.measured_s - 1)


def published() -> list[Compared]:
    """The datasheet tier against what others published."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [_published(row) for row in csv.DictReader(file)]


def _published(row: dict[str, str]) -> Compared:
    gpu, shape = find_gpu(row["gpu"]), find_model(row["model"])
    batch, context = int(row["batch"]), int(row["context"])
    # A microbatch reads one sequence's cache for all of its tokens.
    cache = shape.kv_bytes(context) / batch
    asked = (shape, gpu, "bf16", batch, cache)
    times = decode_steps(*asked, measured=False)
    return Compared(
        gpu.slug,
        batch,
        context,
        batch / float(row["tokens_per_s"]),
        float(times.value_s),
        float(times.low_s),
        float(times.high_s),
        float(roofline_decode_steps(*asked)),
        float(scaled_decode_steps(*asked)),
        f"{row['engine']}, {row['source']}",
    )


def left_out(results: Path) -> list[Compared]:
    """Every measured GPU from every other one's profile; nothing where there are no two."""
    measured = {}
    for path in sorted(results.glob("decode-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "points" in document:
            measured[document["gpu"]] = document["points"]
    found = []
    for wanted, source in permutations(measured, 2):
        profile = find_measured(source)
        if profile is not None:
            found += [_left_out(wanted, source, point) for point in measured[wanted]]
    return found


def _left_out(wanted: str, source: str, point: dict[str, Any]) -> Compared:
    gpu, shape, tables = find_gpu(wanted), find_model("llama-8b"), _from_another(wanted, source)
    batch, context = point["predicted"]["batch"], point["predicted"]["context"]
    cache = shape.kv_bytes(context)
    answer = measured_steps(
        tables, gpu, shape, "bf16", np.array(float(batch)), {"bf16": np.array(float(cache))}
    )
    source = f"profile of {source}"
    return _compared(gpu, shape, batch, context, point["measured"]["step_s"], answer, source)


def _compared(
    gpu: GpuProfile,
    shape: ModelShape,
    batch: int,
    context: int,
    measured_s: float,
    answer: Answer,
    source: str,
) -> Compared:
    cache = shape.kv_bytes(context)
    return Compared(
        gpu.slug,
        batch,
        context,
        measured_s,
        float(answer.value),
        float(answer.low),
        float(answer.high),
        float(roofline_decode_steps(shape, gpu, "bf16", batch, cache)),
        float(scaled_decode_steps(shape, gpu, "bf16", batch, cache)),
        source,
    )


def _from_another(wanted: str, source: str) -> Tables:
    profile, gpu = profile_of(source), find_gpu(wanted)
    rows = transferred(profile.rows, find_gpu(source), gpu)
    return Tables(Kernels(rows), "transferred", source, kernels_of(profile))


def runtime_left_out() -> list[Compared]:
    """The same of the runtime's whole steps, as the profiles have them."""
    slugs = [gpu.slug for gpu in list_gpus() if find_measured(gpu.slug)]
    return [
        point
        for wanted, source in permutations(slugs, 2)
        for row in kernels_of(profile_of(wanted)).rows("runtime_step")
        if (point := _runtime_left_out(wanted, source, row))
    ]


def profile_of(slug: str) -> MeasuredProfile:
    profile = find_measured(slug)
    if profile is None:
        raise ValueError(slug)
    return profile


def _runtime_left_out(wanted: str, source: str, row: KernelRow) -> Compared | None:
    point, gpu, tables = row.point, find_gpu(wanted), _from_another(wanted, source)
    shape = model_of_size(point.rows, point.width_in, point.width_out)
    if shape is None:
        return None
    batch, cache = np.array(float(point.batch)), shape.kv_bytes(point.length)
    answer = runtime_steps(tables, gpu, shape, "bf16", batch, {"bf16": np.array(float(cache))})
    if answer is None:
        return None
    source = f"{shape.name}, profile of {source}"
    return _compared(gpu, shape, point.batch, point.length, row.seconds, answer, source)


def summary(points: Sequence[Compared]) -> dict[str, Any]:
    """Median and worst errors in per cent, and the share of points inside the interval."""
    if not points:
        return {"points": 0}
    every = {
        key: [abs(p.error(key)) for p in points] for key in ("ours_s", "roofline_s", "scaled_s")
    }
    return {
        "points": len(points),
        "inside_interval": float(np.mean([p.inside for p in points])),
        **{k: {"median": float(np.median(v)), "worst": max(v)} for k, v in every.items()},
    }


def report(title: str, points: Sequence[Compared]) -> dict[str, Any]:
    """Print every point and the errors by GPU."""
    by_gpu: dict[str, list[Compared]] = defaultdict(list)
    print(f"\n{title}")
    for p in points:
        by_gpu[p.gpu].append(p)
        print(
            f"{p.gpu:<14} b{p.batch:<3} {p.context:>7}  {p.measured_s * 1e3:8.2f} ms  "
            f"ours {p.ours_s * 1e3:8.2f} ({p.error('ours_s'):+6.1f} %, "
            f"{'inside' if p.inside else 'OUTSIDE'})  roofline {p.error('roofline_s'):+6.1f} %  "
            f"0.8 x bandwidth {p.error('scaled_s'):+6.1f} %  {p.source}"
        )
    errors = {gpu: summary(some) for gpu, some in by_gpu.items()} | {"all": summary(points)}
    print(json.dumps(errors, indent=2))
    return {"errors": errors, "points": [asdict(p) for p in points]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_json(
        arguments.out,
        {
            "left_out": report("Leaving one GPU out", left_out(arguments.results)),
            "runtime_left_out": report("The runtime's steps, likewise", runtime_left_out()),
            "published": report("Published step times, datasheet tier alone", published()),
        },
    )


if __name__ == "__main__":
    main()
