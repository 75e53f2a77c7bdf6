"""Prompts into pages: rows of a layer that were read together, and nobody waits for the device.

Host tables are made in one pass and sent in one copy; all pages of a layout are one launch. Pages
of the host are written on the device a slab at a time, and copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.pages import PageLayout, exact_among
from kvtune.runtime.cache.backend import FittedTables, Writing
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, GROWN, NO_END, SETTLED, Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.reference import LARGEST_E4M3, fp8_scale

Records = NDArray[np.int32]


def store_prompts(
    layer: PagedLayer,
    keys: Tensor,
    values: Tensor,
    kept: Sequence[Tensor],
    exact: Sequence[int] | None = None,
    rows: slice | None = None,
    weights: Tensor | None = None,
    newest: Sequence[int] | None = None,
) -> None:
    """Put kept prompt tokens into pages. Once for each row, before the layer is sealed.

    Rows that may hold no more than ``most`` entries keep all in growing segments, unless they evict
    from fewer bits.

    Args:
        layer: these rows of it are empty.
        keys: ``[n, P, D]`` contiguous, after RoPE; of each of the rows, or of one sequence's heads,
            which then stand for every sequence's.
        values: likewise.
        kept: token indices of each of the n, those that stay in 16 bits first.
        exact: how many of each do; the first ones that their format leaves exact unless given.
        rows: of the layer, those that are stored; all of them unless given.
        weights: ``[n, D]``, by which keys are multiplied before they are coded and divided where
            they are read, in pages that have tables; None where no method weights them.
        newest: how many of the exact ones settle when newer ones come; those that their format
            says of all tokens unless given.

    Raises:
        PoolFullError: the pool is full.
    """
    sizes = np.array([len(tokens) for tokens in kept])
    if exact is None:
        most = max(sizes, default=0)
        exact = [sum(exact_among(option.keys, most)) for option in layer.options]
    if newest is None:
        forms = [option.keys for option in layer.options]
        newest = [exact_among(forms[n % len(forms)], size)[1] for n, size in enumerate(sizes)]
    rows = rows or slice(0, layer.rows)
    _count(layer, rows, sizes, np.array(exact), np.array(newest))
    of_heads = layer.layouts[: len(layer.options)]  # every sequence has the same
    layouts = {layout.code: layout for layout in (*of_heads, layer.growing_layout)}
    here = {number: _records(layer, layout, rows, sizes) for number, layout in layouts.items()}
    there = list(_on_host(layer, rows, sizes)) if layer.host else []
    tables = [*here.values(), *(records for _, _, records in there)]
    firsts = layer.exact[rows][: len(kept)]
    counts, exact_of, *records = sent([sizes, firsts, *tables], keys.device)
    chosen = torch.cat(list(kept))
    magnitudes = torch.stack([x.abs().amax(-1) for x in (keys, values)])
    layer.finite[rows][: len(kept)] = magnitudes.amax(-1).isfinite().all(0)
    if any(layout.has_head_scales for layout in of_heads):
        by_kind = layer.fp8_scales.view(3, -1, 2)[:, rows].unflatten(1, (-1, len(kept)))
        row = torch.repeat_interleave(counts.long(), output_size=len(chosen))
        coded = is_coded(row, counts.cumsum(0) - counts, exact_of)
        by_kind[CODED] = fp8_scales(magnitudes[:, row, chosen], row, coded, len(kept))
        by_kind[SETTLED] = by_kind[CODED]  # what settles is held to the prompt's range
    places = chosen.int()
    for layout, pages in zip(layouts.values(), records, strict=False):
        if len(pages):
            fitted = _tables(layer, layout, rows, weights)
            writing = Writing(layout, keys, values, places, pages, layer.fp8_scales, fitted)
            layer.backend.write(layer.pool.memory, writing)
    for (layout, place, _), pages in zip(there, records[len(layouts) :], strict=True):
        writing = Writing(layout, keys, values, places, pages, layer.fp8_scales)
        _to_host(layer, place, writing)


def _count(layer: PagedLayer, rows: slice, sizes: Ints, exact: Ints, newest: Ints) -> None:
    """How much of the tokens of some rows is coded, how much grows, and how much stays there."""
    count = rows.stop - rows.start
    sizes, exact, newest = (np.resize(each, count) for each in (sizes, exact, newest))
    grows = (layer.most[rows] < NO_END) & ~layer.evicts_coded[rows]
    layer.exact[rows] = np.minimum(np.where(grows, NO_END, exact), sizes)
    layer.staying[rows] = layer.exact[rows] - newest * ~grows
    layer.lengths[CODED, rows] = sizes - layer.exact[rows]
    layer.lengths[GROWN, rows] = layer.exact[rows]
    layer.kept[rows] = sizes.tolist()


def _records(layer: PagedLayer, layout: PageLayout, rows: slice, sizes: Ints) -> Records:
    """Take all pages of one layout on the device for some rows; ``Writing.records`` of them."""
    held = np.zeros_like(layer.lengths[:SETTLED])
    held[:, rows] = layer.lengths[:SETTLED, rows]
    held[CODED, layer.on_host] = 0
    held = held.ravel()
    mine = np.flatnonzero((layer.codes[:SETTLED].ravel() == layout.code) & (held > 0))
    cells = layer.take(mine, -(-held[mine] // layout.page_tokens), layout)
    return _listed(layer, layout, rows, sizes, mine, held[mine], cells)


def _tables(
    layer: PagedLayer, layout: PageLayout, rows: slice, weights: Tensor | None
) -> FittedTables | None:
    """Take room for the tables of some rows' pages of one layout, where it has any."""
    if not layout.has_tables:
        return None
    held = np.zeros(layer.rows, bool)
    held[rows] = layer.lengths[CODED, rows] > 0
    mine = np.flatnonzero(held & (layer.codes[CODED] == layout.code))
    layer.tables[mine] = layer.pool.take(len(mine), layout.tables.page_cells)
    there = sent([layer.tables], layer.pool.memory.device)[0]
    if weights is not None:
        every = weights.new_ones(layer.rows, weights.shape[1])
        every[rows] = weights.repeat((rows.stop - rows.start) // len(weights), 1)
        weights = every
    return FittedTables(there, weights)


def _on_host(
    layer: PagedLayer, rows: slice, sizes: Ints
) -> Iterator[tuple[PageLayout, int, Records]]:
    """Take host memory for some rows: layout, place and records of pages that lie side by side."""
    if layer.host is None:
        return
    for row in range(rows.start, rows.stop):
        held = layer.lengths[CODED, row : row + 1]
        if not (layer.on_host[row] and held > 0):
            continue
        layout = layer.layouts[row]
        pages, each = layout.pages_for(int(held[0])), layout.block_pages
        places = layer.host.take(row, layout.blocks_of(pages), layout)
        for run in layer.host.pool.runs(places, layout.block_bytes):
            first = each * run.start
            cells = layout.page_cells * (np.arange(pages) - first)  # of the memory in between
            records = _listed(layer, layout, rows, sizes, np.array([row]), held, cells)
            yield layout, int(places[run.start]), records[first : each * run.stop]


def _to_host(layer: PagedLayer, place: int, writing: Writing) -> None:
    """Write pages that lie side by side on the host, by way of as much memory of the device."""
    if layer.host is None:
        raise RuntimeError("the layer has nothing on the host")
    size = len(writing.records) * writing.layout.page_bytes
    between = torch.empty(size, dtype=torch.uint8, device=writing.keys.device)
    layer.backend.write(between, writing)
    layer.host.pool.put(place, between)


def _listed(
    layer: PagedLayer,
    layout: PageLayout,
    rows: slice,
    sizes: Ints,
    segments: Ints,
    held: Ints,
    cells: Ints,
) -> Records:
    """``Writing.records`` of all pages of some segments of one layout that hold so many tokens."""
    pages = -(-held // layout.page_tokens)
    kind, row = np.divmod(segments, layer.rows)
    source = (row - rows.start) % len(sizes)
    first = (sizes.cumsum() - sizes)[source] + np.where(kind == CODED, layer.exact[row], 0)
    start, which = layout.page_tokens * runs(pages), np.repeat(np.arange(len(segments)), pages)
    counts = np.minimum(held[which] - start, layout.page_tokens)
    columns = (source[which], first[which] + start, counts, cells, segments[which])
    return np.stack(columns, axis=1).astype(np.int32)


def is_coded(row: Tensor, first: Tensor, exact: Tensor) -> Tensor:
    """Whether each token listed is one that its format codes, bool ``[n]``.

    Args:
        row: whose each is, int64 ``[n]``.
        first: where each one's tokens begin in the list, ``[rows]``.
        exact: how many of each one's first ones stay in 16 bits, ``[rows]``.
    """
    place = torch.arange(len(row), device=row.device)
    return place - first[row] >= exact[row]


def fp8_scales(magnitudes: Tensor, row: Tensor, coded: Tensor, rows: int) -> Tensor:
    """``[rows, 2]`` float32, of the tokens that are coded; of all where none is, and 1 without any.

    Args:
        magnitudes: ``[2, n]``, the largest number of each kept key, and of each kept value.
        row: whose each is, int64 ``[n]``.
        coded: of ``is_coded``.
        rows: how many there are.
    """
    none = magnitudes.new_full((2, rows), LARGEST_E4M3, dtype=torch.float32)
    index, numbers = row.expand(2, -1), magnitudes.float()
    every = none.scatter_reduce(1, index, numbers, "amax", include_self=False)
    some = torch.zeros_like(none).scatter_reduce(1, index, numbers * coded, "amax")
    return fp8_scale(torch.where(some > 0, some, every)).T
