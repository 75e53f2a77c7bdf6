"""Decode attention over pages of every cache format, uniform and ragged, by our own kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from kvtune.policies.page_formats import VALUE_CODES
from kvtune.policies.pages import layout_named
from kvtune.profiles.kernel_table import Point
from kvtune.runtime.kernels.launch import decode
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Call, Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.ops.ragged import SHARES
from kvtune.runtime.measure.paged_layer import Run, random_layer


def _points(grid: Grid) -> Iterator[Wanted]:
    """None without Triton and a GPU: the kernel has nothing to be compiled for."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    queries, kv_heads, width = grid.heads[0]
    for number_format in VALUE_CODES:
        for spread in ("uniform", "ragged"):
            for batch in grid.batches[::3]:
                for length in grid.lengths[::3]:
                    if grid.cache_fits(batch, length, grid.heads[0]):
                        yield Wanted(
                            2,
                            Point(
                                "attention_paged", "kvtune-paged", number_format=number_format,
                                batch=batch, query_heads=queries, kv_heads=kv_heads,
                                head_dim=width, length=length, spread=spread,
                            ),
                        )  # fmt: skip


def _prepare(point: Point, setting: Setting) -> Work:
    layout = layout_named(point.head_dim, point.number_format)
    shares = SHARES if point.spread == "ragged" else (1.0,)
    runs = [
        Run(row, layout, max(1, int(point.length * shares[row % len(shares)])))
        for row in range(point.batch * point.kv_heads)
    ]
    held = sum(run.pages for run in runs) * layout.page_bytes
    group = point.query_heads // point.kv_heads
    count = copies(setting.grid, point, held)
    return Work([_call(runs, group, setting) for _ in range(count)], held)


def _call(runs: list[Run], group: int, setting: Setting) -> Call:
    layer = random_layer(runs, group, setting.device)
    return lambda: decode(layer.query, layer.paged, layer.scratch, layer.scale)


OPERATIONS = (Operation("attention_paged", _points, _prepare),)
