"""Decode attention over pages of every cache format, uniform and ragged, by our own kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.kernels.launch import Paged, Scratch, decode
from kvtune.runtime.kernels.layout import CODES, PAGE, PageLayout
from kvtune.runtime.kernels.tiles import Segments, plan_tiles
from kvtune.runtime.measure.grid import Grid
from kvtune.runtime.measure.operation import Call, Operation, Setting, Wanted, Work, copies
from kvtune.runtime.measure.ops.ragged import SHARES
from kvtune.runtime.measure.plain_model import random_tensor


def _points(grid: Grid) -> Iterator[Wanted]:
    """None without Triton and a GPU: the kernel has nothing to be compiled for."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    queries, kv_heads, width = grid.heads[0]
    for number_format in CODES:
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
    layout = PageLayout(point.head_dim, point.number_format, point.number_format)
    rows = point.batch * point.kv_heads
    shares = SHARES if point.spread == "ragged" else (1.0,)
    tokens = np.array([max(1, int(point.length * shares[r % len(shares)])) for r in range(rows)])
    held = int((-(-tokens // PAGE)).sum()) * layout.page_bytes
    group = point.query_heads // point.kv_heads
    query = random_tensor(rows, group, point.head_dim, device=setting.device, scale=1.0)
    count = copies(setting.grid, point, held)
    return Work([_call(layout, tokens, query, setting) for _ in range(count)], held)


def _call(layout: PageLayout, tokens: np.ndarray, query: torch.Tensor, setting: Setting) -> Call:
    """One layer: pages in a random order, their bytes those of random numbers."""
    pages = -(-tokens // PAGE)
    rows, total = len(tokens), int(pages.sum())
    cells = np.random.default_rng(0).permutation(total) * layout.page_cells
    table = np.append(cells, 0)  # the kernel looks one entry ahead
    segments = Segments(
        np.arange(rows), np.full(rows, layout.code), pages.cumsum() - pages, pages, tokens
    )
    tiles = plan_tiles(segments, table)

    def ints(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values.astype(np.int32), device=setting.device)

    pool = random_tensor(total * layout.page_bytes // 2, device=setting.device, scale=1.0)
    cache = Paged(
        pool.view(torch.uint8), ints(table), ints(tokens),
        torch.ones(rows, 2, device=setting.device), ints(tiles.records), tiles.pairs,
        layout.head_dim,
    )  # fmt: skip
    scratch = Scratch.fits(tiles, rows, query.shape[1], layout.head_dim, setting.device)
    return lambda: decode(query, cache, scratch, layout.head_dim**-0.5)


OPERATIONS = (Operation("attention_paged", _points, _prepare),)
