"""How well the kernel table answers between and beyond its points: each one left out in turn.

    python benchmarks/hardware_held_out.py --profile profiles/measured/h100-sxm

Decode attention over batch and length, and each matrix over its rows. A point is inside where
others lie on both sides of it along every axis, else at the edge.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import read_measured
from kvtune.simulator.kernels import Kernels


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


def _between(value: int, values: Iterable[int]) -> bool:
    known = list(values)
    return min(known) < value < max(known)


def line(name: str, errors: Sequence[float]) -> str:
    sizes = np.abs(errors)
    if not len(sizes):
        return f"{name:<28} no points"
    return (
        f"{name:<28} {len(sizes):>4} points  median {np.median(sizes):5.1f} %  "
        f"90 % within {np.percentile(sizes, 90):5.1f} %  worst {sizes.max():5.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    rows = read_measured(parser.parse_args().profile).rows
    for name, errors in (("decode attention", attention_errors), ("linear", linear_errors)):
        for inside in (True, False):
            place = "inside" if inside else "at the edge"
            print(line(f"{name}, {place}", list(errors(rows, inside))))


if __name__ == "__main__":
    main()
