"""What the runtime's benchmarks share: random paged layers, and cold timings in a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.backend import FittedTables, Writing
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.kernels.launch import Paged, Scratch, Shape, decode
from kvtune.runtime.kernels.reference import read_page
from kvtune.runtime.kernels.reference_signs import read_sign_pages
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, Segments, plan_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, Triton's interpreter can check
COLD_BYTES = 400e6  # eight times the L2 of an H100: what a rotation of buffers must exceed


@dataclass(frozen=True)
class Run:
    """One segment of a layer: some of a row's first tokens in a format."""

    row: int
    keys: str
    values: str
    tokens: int


@dataclass(frozen=True)
class Layer:
    """A layer in pages, with random keys and values."""

    paged: Paged
    scratch: Scratch
    group: int
    head_dim: int
    runs: Sequence[Run]
    payload_bytes: int
    tables: Tensor

    @property
    def rows(self) -> int:
        return len(self.scratch.arrived)

    def dense(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's keys and values ``[n, D]`` float64, read back by the reference."""
        keys, values, at = [], [], 0
        for segment, run in enumerate(self.runs):
            layout = PageLayout(self.head_dim, run.keys, run.values)
            for page in range(0, run.tokens, layout.page_tokens):
                if run.row == row:
                    start = int(self.paged.table[at]) * layout.cell_bytes
                    raw = self.paged.pool[start : start + layout.page_bytes]
                    pair = self._read(raw, layout, segment)
                    count = min(layout.page_tokens, run.tokens - page)
                    keys.append(pair[0][:count])
                    values.append(pair[1][:count])
                at += 1
        return torch.cat(keys).double(), torch.cat(values).double()

    def _read(self, page: Tensor, layout: PageLayout, segment: int) -> tuple[Tensor, Tensor]:
        if not layout.has_tables:
            return read_page(page, layout, self.paged.fp8_scales[segment])
        start = int(self.tables[segment]) * layout.cell_bytes
        size = layout.tables.page_bytes
        tables = self.paged.pool[start : start + size]
        keys, values = read_sign_pages(page[None], tables[None], layout)
        return keys[0], values[0]


def make_layer(
    runs: Sequence[Run], rows: int, group: int, head_dim: int, programs: int | None = None
) -> Layer:
    """Random tokens in pages; those of all rows are shuffled in the pool, tables behind them."""
    longest = max(run.tokens for run in runs)
    keys = torch.randn(rows, max(longest, 1), head_dim, device=DEVICE, dtype=torch.bfloat16)
    values = torch.randn_like(keys)
    layouts = [PageLayout(head_dim, run.keys, run.values) for run in runs]
    pages = np.array([x.pages_for(run.tokens) for x, run in zip(layouts, runs, strict=True)])
    cells = np.repeat([layout.page_cells for layout in layouts], pages)
    order = np.random.default_rng(0).permutation(len(cells))
    start = np.empty(len(cells), np.int64)
    start[order] = cells[order].cumsum() - cells[order]
    tables = np.array([x.tables.page_cells if x.has_tables else 0 for x in layouts])
    every = int(cells.sum() + tables.sum())
    tables_at = cells.sum() + tables.cumsum() - tables
    segments = Segments(
        np.array([run.row for run in runs]),
        np.array([layout.code for layout in layouts]),
        pages.cumsum() - pages,
        pages,
        np.array([run.tokens for run in runs]),
        tables_at,
    )
    tiles = plan_tiles(segments, start, programs)
    top = torch.full((len(runs), 2), 5.0 / 448, device=DEVICE)  # normal numbers stay below 5
    paged = Paged(
        torch.zeros(every * 4 * head_dim, dtype=torch.uint8, device=DEVICE),
        torch.tensor(np.append(start, [0] * TABLE_AHEAD), dtype=torch.int32, device=DEVICE),
        torch.tensor([run.tokens for run in runs], dtype=torch.int32, device=DEVICE),
        top,
        torch.tensor(tiles.records, device=DEVICE),
        tiles.pairs,
        head_dim,
    )
    there = torch.tensor(tables_at, dtype=torch.int32, device=DEVICE)
    _fill(paged, runs, pages, start, (keys, values), there)
    payload = sum(_payload(run, layout) for run, layout in zip(runs, layouts, strict=True))
    scratch = Scratch.fits(tiles, rows, group, head_dim, DEVICE)
    return Layer(paged, scratch, group, head_dim, runs, payload, there)


def _payload(run: Run, layout: PageLayout) -> int:
    tables = layout.tables.used_bytes if layout.has_tables else 0
    return run.tokens * layout.page_bytes // layout.page_tokens + tables


WRITTEN = 2
"""Runs alike of which each is coded; the others are copies, since laying a GiB takes minutes."""


def _fill(
    paged: Paged, runs: Sequence[Run], pages: Any, start: Any, held: tuple[Tensor, Tensor],
    tables: Tensor,
) -> None:  # fmt: skip
    alike: dict[tuple[str, str, int], list[int]] = {}
    for number, run in enumerate(runs):
        alike.setdefault((run.keys, run.values, run.tokens), []).append(number)
    first = {n: some[k % WRITTEN] for some in alike.values() for k, n in enumerate(some)}
    _write(paged, runs, (pages, start), held, tables, sorted(set(first.values())))
    cells = paged.pool.view(-1, 4 * paged.head_dim)
    ends = pages.cumsum()
    for number, run in enumerate(runs):
        source = first[number]
        if source == number:
            continue
        layout = PageLayout(paged.head_dim, run.keys, run.values)
        inside = np.arange(layout.page_cells)
        theirs, mine = (
            start[ends[n] - pages[n] : ends[n], None] + inside for n in (source, number)
        )
        cells[torch.tensor(mine, device=DEVICE)] = cells[torch.tensor(theirs, device=DEVICE)]
        if layout.has_tables:
            size = layout.tables.page_cells
            at, to = int(tables[source]), int(tables[number])
            cells[to : to + size] = cells[at : at + size]


def _write(
    paged: Paged, runs: Sequence[Run], placed: tuple[Any, Any], held: tuple[Tensor, Tensor],
    tables: Tensor, written: Sequence[int],
) -> None:  # fmt: skip
    keys, values = held
    pages, start = placed
    segment = np.repeat(np.arange(len(runs)), pages)
    turn = np.arange(len(segment)) - np.repeat(pages.cumsum() - pages, pages)
    each = np.array([PageLayout(keys.shape[2], r.keys, r.values).page_tokens for r in runs])[
        segment
    ]
    tokens = np.array([run.tokens for run in runs])[segment] - turn * each
    rows = np.array([run.row for run in runs])[segment]
    records = np.stack([rows, turn * each, np.minimum(tokens, each), start, segment], 1)
    chosen = torch.arange(keys.shape[1], dtype=torch.int32, device=DEVICE)
    pairs = {(run.keys, run.values) for run in runs if run.tokens}
    for pair in pairs:
        mine = [(runs[s].keys, runs[s].values) == pair and s in written for s in segment]
        some = torch.tensor(records[mine].astype(np.int32), device=DEVICE)
        layout = PageLayout(keys.shape[2], *pair)
        fitted = FittedTables(tables) if layout.has_tables else None
        writing = Writing(layout, keys, values, chosen, some, paged.fp8_scales, fitted)
        TritonBackend().write(paged.pool, writing)


def uniform(rows: int, tokens: int, keys: str = "bf16", values: str = "") -> list[Run]:
    """Every row with the same number of tokens in one format."""
    return [Run(row, keys, values or keys, tokens) for row in range(rows)]


def attention_calls(
    layers: Sequence[Layer], shape: Shape | None = None
) -> list[Callable[[], object]]:
    """A call a layer, with its query and output in place."""
    calls: list[Callable[[], object]] = []
    for layer in layers:
        q = torch.randn(
            layer.rows, layer.group, layer.head_dim, device=DEVICE, dtype=torch.bfloat16
        )
        out, lse = torch.empty_like(q), torch.empty(layer.rows, layer.group, device=DEVICE)

        def call(layer: Layer = layer, q: Tensor = q, out: Any = out, lse: Any = lse) -> object:
            return decode(q, layer.paged, layer.scratch, 0.088, out, lse, shape=shape)

        calls.append(call)
    return calls


def copies(layer_bytes: float) -> int:
    """Buffers that together cannot stay in L2."""
    return max(2, int(np.ceil(COLD_BYTES / layer_bytes)))


def time_s(calls: Sequence[Callable[[], object]], at_least_s: float = 0.02) -> float:
    """Seconds a call: all calls in one CUDA graph, replayed; the median of five stretches."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _stretch(graph, 2) / 2
    replays = max(2, min(200, int(at_least_s / once)))
    stretches = [_stretch(graph, replays) / replays for _ in range(5)]
    return statistics.median(stretches) / len(calls)


def _stretch(graph: Any, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
