"""Prompts into pages: rows of a layer that were read together, and nobody waits for the device.

Host tables are made in one pass and sent in one copy; all pages of a layout are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.pages import PageLayout, exact_tokens
from kvtune.runtime.cache.backend import Writing
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, GROWN, NO_END, SETTLED, Ints, runs
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.kernels.reference import LARGEST_E4M3, fp8_scale


def store_prompts(
    layer: PagedLayer,
    keys: Tensor,
    values: Tensor,
    kept: Sequence[Tensor],
    exact: Sequence[int] | None = None,
    rows: slice | None = None,
) -> None:
    """Put kept prompt tokens into pages. Once for each row, before the layer is sealed.

    Rows that may hold no more than ``most`` entries keep all in growing segments.

    Args:
        layer: these rows of it are empty.
        keys: ``[n, P, D]`` contiguous, after RoPE; of each of the rows, or of one sequence's heads,
            which then stand for every sequence's.
        values: likewise.
        kept: token indices of each of the n, those that stay in 16 bits first.
        exact: how many of each do; the first ones that their format leaves exact unless given.

    Raises:
        KvtuneError: the pool is full.
    """
    sizes = np.array([len(tokens) for tokens in kept])
    if exact is None:
        exact = [exact_tokens(option.keys) for option in layer.options]
    rows = rows or slice(0, layer.rows)
    _count(layer, rows, sizes, np.array(exact))
    layouts = {layout.code: layout for layout in (*layer.layouts, layer.growing_layout)}
    tables = [_records(layer, layout, rows, sizes) for layout in layouts.values()]
    counts, *records = sent([sizes, *tables], keys.device)
    chosen = torch.cat(list(kept))
    magnitudes = torch.stack([x.abs().amax(-1) for x in (keys, values)])
    layer.finite[rows][: len(kept)] = magnitudes.amax(-1).isfinite().all(0)
    if any("fp8" in (layout.keys, layout.values) for layout in layer.layouts):
        by_kind = layer.fp8_scales.view(3, -1, 2)[:, rows].unflatten(1, (-1, len(kept)))
        by_kind[CODED] = _fp8_scales(magnitudes, chosen, counts)
        by_kind[SETTLED] = by_kind[CODED]  # what settles is held to the prompt's range
    places = chosen.int()
    for layout, pages in zip(layouts.values(), records, strict=True):
        if len(pages):
            writing = Writing(layout, keys, values, places, pages, layer.fp8_scales)
            layer.backend.write(layer.pool.memory, writing)


def _count(layer: PagedLayer, rows: slice, sizes: Ints, exact: Ints) -> None:
    """How much of the tokens of some rows is coded, and how much grows."""
    count = rows.stop - rows.start
    sizes, exact = np.resize(sizes, count), np.resize(exact, count)
    layer.exact[rows] = np.minimum(np.where(layer.most[rows] < NO_END, NO_END, exact), sizes)
    layer.lengths[CODED, rows] = sizes - layer.exact[rows]
    layer.lengths[GROWN, rows] = layer.exact[rows]
    layer.kept[rows] = sizes.tolist()


def _records(layer: PagedLayer, layout: PageLayout, rows: slice, sizes: Ints) -> NDArray[np.int32]:
    """Take all pages of one layout for some rows; ``Writing.records`` of them."""
    held = np.zeros_like(layer.lengths[:SETTLED])
    held[:, rows] = layer.lengths[:SETTLED, rows]
    held = held.ravel()
    mine = np.flatnonzero((layer.codes[:SETTLED].ravel() == layout.code) & (held > 0))
    pages = -(-held[mine] // layout.page_tokens)
    cells = layer.take(mine, pages, layout)
    kind, row = np.divmod(mine, layer.rows)
    source = (row - rows.start) % len(sizes)
    first = (sizes.cumsum() - sizes)[source] + np.where(kind == CODED, layer.exact[row], 0)
    start, which = layout.page_tokens * runs(pages), np.repeat(np.arange(len(mine)), pages)
    counts = np.minimum(held[mine][which] - start, layout.page_tokens)
    columns = (source[which], first[which] + start, counts, cells, mine[which])
    return np.stack(columns, axis=1).astype(np.int32)


def _fp8_scales(magnitudes: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """``[n, 2]`` float32, of the tokens that are kept; 1 where there are none.

    Args:
        magnitudes: ``[2, n, P]``, the largest of each key's numbers, and of each value's.
        chosen: kept tokens, one list after another.
        counts: of each list, ``[n]``.
    """
    row = torch.repeat_interleave(counts.long(), output_size=len(chosen))
    none = magnitudes.new_full(magnitudes.shape[:2], LARGEST_E4M3, dtype=torch.float32)
    theirs = magnitudes[:, row, chosen].float()
    largest = none.scatter_reduce(1, row.expand(2, -1), theirs, "amax", include_self=False)
    return fp8_scale(largest).T
