"""Random pages of one layer, for tests of what reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.backend import Writing
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.kernels.launch import Paged
from kvtune.runtime.kernels.reference import read_page
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, Segments, plan_tiles


def layer(
    head_dim: int, runs: list[tuple[int, str, str, int]], seed: int
) -> tuple[Paged, list[list[tuple[Tensor, Tensor]]]]:
    """Random pages of (row, keys, values, tokens), and what they hold."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [PageLayout(head_dim, keys, values) for _, keys, values, _ in runs]
    sizes = [layout.page_tokens for layout in layouts]
    pages = np.array([x.pages_for(tokens) for x, (*_, tokens) in zip(layouts, runs, strict=True)])
    cells = np.repeat([layout.page_cells for layout in layouts], pages)
    start = cells.cumsum() - cells
    pool = torch.zeros(int(cells.sum()) * 4 * head_dim, dtype=torch.uint8)
    scales = torch.full((len(runs), 2), 0.01)
    held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 + max(r for r, *_ in runs))]
    for segment, (row, _, _, tokens) in enumerate(runs):
        keys, values = torch.randn(2, 1, tokens, head_dim, generator=generator).bfloat16()
        at = start[pages[:segment].sum() :][: pages[segment]]
        first = np.arange(pages[segment]) * sizes[segment]
        columns = (0, first, np.minimum(tokens - first, sizes[segment]), at, segment)
        pages_of = torch.from_numpy(np.stack(np.broadcast_arrays(*columns), 1)).int()
        chosen = torch.arange(tokens, dtype=torch.int32)
        layout = layouts[segment]
        if len(pages_of):
            PlainBackend().write(pool, Writing(layout, keys, values, chosen, pages_of, scales))
        for cell, count in zip(at, columns[2], strict=True):
            raw = pool[cell * 4 * head_dim :][: layout.page_bytes]
            read = read_page(raw, layout, scales[segment])
            held[row].append((read[0][:count], read[1][:count]))
    growing = np.array([segment % 2 for segment in range(len(runs))], bool)
    lengths = np.array([tokens for *_, tokens in runs])
    segments = Segments(
        np.array([row for row, *_ in runs]), np.array([x.code for x in layouts]),
        pages.cumsum() - pages, pages, np.where(growing, -1, lengths),
    )  # fmt: skip
    tiles = plan_tiles(segments, start, programs=7)
    table = torch.tensor(np.append(start, [0] * TABLE_AHEAD), dtype=torch.int32)
    counts = torch.tensor(lengths, dtype=torch.int32)
    records = torch.tensor(tiles.records)
    return Paged(pool, table, counts, scales, records, tiles.pairs, head_dim), held
