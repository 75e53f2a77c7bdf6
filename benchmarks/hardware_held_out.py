"""How well the kernel table answers between and beyond its points: each one left out in turn.

    python benchmarks/hardware_held_out.py --profile profiles/measured/h100-sxm

Decode attention over batch and length, and each matrix over its rows. A point is inside where
others lie on both sides of it along every axis, else at the edge. Steps and prefills of the runtime
are left out a whole model at a time: inside is the one between two others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import read_measured
from kvtune.profiles.models import model_of_size
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.prefills import runtime_prefills
from kvtune.simulator.latency.runtime import runtime_steps
from kvtune.simulator.latency.transfer import Tables


def attention_errors(rows: Sequence[KernelRow], inside: bool) -> Iterator[float]:
    """Relative errors, in per cent, of decode attention points left out."""
    heads = Kernels(rows).heads()
    mine = [
        row
        for row in rows
        if row.point.op == "attention_decode"
        and row.point.spread == "uniform"
        and row.point.l2 == "cold"
        and (row.point.query_heads, row.point.kv_heads, row.point.head_dim) == heads
    ]
    for row in mine:
        point = row.point
        along = [r.point.length for r in mine if r.point.batch == point.batch]
        if _between(point.length, along) == inside:
            others = Kernels(r for r in mine if r is not row)
            answer = others.attention(heads, point.batch, point.length)
            yield 100 * (float(answer) / row.seconds - 1)


def linear_errors(rows: Sequence[KernelRow], inside: bool) -> Iterator[float]:
    """The same for matrix products over their rows."""
    mine = [row for row in rows if row.point.op == "linear"]
    for row in mine:
        size = (row.point.width_out, row.point.width_in)
        same = [r for r in mine if (r.point.width_out, r.point.width_in) == size]
        if len(same) > 3 and _between(row.point.rows, [r.point.rows for r in same]) == inside:
            others = Kernels(r for r in mine if r is not row)
            yield 100 * (float(others.linear(*size, row.point.rows)) / row.seconds - 1)


def step_errors(rows: Sequence[KernelRow], inside: bool, gpu: GpuProfile) -> Iterator[float]:
    """Relative errors, in per cent, of the runtime's steps of models that are left out."""
    for shape, mine, tables in _without_a_model(rows, "runtime_step", inside, gpu):
        for row in mine:
            batch, cache = np.array(float(row.point.batch)), shape.kv_bytes(row.point.length)
            asked = tables, gpu, shape, "bf16", batch, {"bf16": np.array(float(cache))}
            if answer := runtime_steps(*asked):
                yield 100 * (float(answer.value) / row.seconds - 1)


def prefill_errors(rows: Sequence[KernelRow], inside: bool, gpu: GpuProfile) -> Iterator[float]:
    """The same of prefills."""
    for shape, mine, tables in _without_a_model(rows, "runtime_prefill", inside, gpu):
        for row in mine:
            prompt, batch = np.array(float(row.point.length)), np.array(float(row.point.batch))
            if answer := runtime_prefills(tables, shape, prompt, batch):
                yield 100 * (float(answer.value) / row.seconds - 1)


def _without_a_model(
    rows: Sequence[KernelRow], op: str, inside: bool, gpu: GpuProfile
) -> Iterator[tuple[ModelShape, list[KernelRow], Tables]]:
    """Each model, its rows, and what is known without them."""
    sizes = {_size(row): row.point.width_in for row in rows if row.point.op == op}
    for size, width in sizes.items():
        shape = model_of_size(*size)
        if shape and _between(width, sizes.values()) == inside:
            mine = [row for row in rows if row.point.op == op and _size(row) == size]
            others = Kernels(row for row in rows if row not in mine)
            yield shape, mine, Tables(others, "measured", gpu.slug)


def _size(row: KernelRow) -> tuple[int, int, int]:
    return row.point.rows, row.point.width_in, row.point.width_out


def _between(value: int, values: Iterable[int]) -> bool:
    known = list(values)
    return min(known) < value < max(known)


def line(name: str, errors: Sequence[float]) -> str:
    sizes = np.abs(errors)
    if not len(sizes):
        return f"{name:<36} no points"
    return (
        f"{name:<36} {len(sizes):>4} points  median {np.median(sizes):5.1f} %  "
        f"90 % within {np.percentile(sizes, 90):5.1f} %  worst {sizes.max():5.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    profile = read_measured(parser.parse_args().profile)
    rows, gpu = profile.rows, find_gpu(profile.slug)
    of_gpu = {
        "the runtime's steps": partial(step_errors, gpu=gpu),
        "the runtime's prefills": partial(prefill_errors, gpu=gpu),
    }
    kinds = {"decode attention": attention_errors, "linear": linear_errors, **of_gpu}
    for name, errors in kinds.items():
        for inside in (True, False):
            place = "inside" if inside else "at the edge"
            print(line(f"{name}, {place}", list(errors(rows, inside))))


if __name__ == "__main__":
    main()
