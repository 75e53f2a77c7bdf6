"""Pages in plain torch, all of a layer at once: a few dozen operations for any number of pages.

A step's time on a CPU is that of its operations, not of its bytes: one page after another took
twenty operations a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.backend import AttentionSeen, Growing
from kvtune.runtime.cache.page_map import Pages, pages_at
from kvtune.runtime.kernels.launch import Paged, Seating
from kvtune.runtime.kernels.reference import read_pages
from kvtune.runtime.kernels.reference_signs import read_sign_pages


def attend_pages(q: Tensor, layer: Paged, scale: float, seen: AttentionSeen | None) -> Tensor:
    """Attention ``[rows, G, D]`` of ``q`` like it over every page of its row, in float32.

    Rows without a token have an output of zeros, and minus infinity as log-sum-exp.
    """
    queries, (found, counts) = q.float() * scale, pages_at(layer)
    output = torch.zeros_like(queries)
    if seen is not None:
        seen.lse.fill_(-torch.inf)
    if not found.pages:
        return output.to(q.dtype)
    keys, values = (torch.cat(parts) for parts in zip(*_all_read(layer, found.pages), strict=True))
    for each in found.rows:
        rows = slice(None) if len(each.rows) == len(queries) else each.rows
        beyond = each.inside >= counts[each.tiles]
        logits = torch.bmm(queries[rows], _taken(keys, each.tokens).mT)
        if seen is not None and seen.logits is not None:
            seen.logits[:, each.columns[each.real]] = logits.transpose(0, 1)[:, each.real]
        logits.masked_fill_(beyond[:, None], -torch.inf)
        seen_values = _taken(values, each.tokens)
        # What lies there may be no number, which no weight of 0 undoes.
        seen_values.flatten(0, 1).index_fill_(0, beyond.flatten().nonzero()[:, 0], 0)
        output[rows] = torch.bmm(logits.softmax(-1), seen_values)
        if seen is not None:
            seen.lse[rows] = logits.logsumexp(-1)
    return output.to(q.dtype)


def records_in_order(layer: Paged, seating: Seating, sequences: int) -> Tensor:
    """Tiles of a step's sequences, ``[n, 16]``, with rows as if there were no seats."""
    seats = seating.seats[:sequences].long()
    records = layer.tiles.view(seating.all_seats, seating.tiles, -1)[seats.clamp_min(0)]
    sequence = torch.arange(sequences, device=seats.device)[:, None]
    records[..., 0] = sequence * seating.heads + records[..., -1]
    records[seats < 0, :, 1] = -1  # no layout: of an empty seat
    return records.flatten(0, 1)


def _all_read(layer: Paged, pages: Sequence[Pages]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layout's pages, ``[tokens, D]`` float32."""
    for each in pages:
        keys, values = _read(layer, each)
        yield keys.flatten(0, 1), values.flatten(0, 1)


def _taken(tokens: Tensor, at: Tensor) -> Tensor:
    """Those ``[r, w]`` of tokens ``[n, D]``; a quarter of the time that an index takes."""
    return tokens.index_select(0, at.flatten()).view(*at.shape, -1)


def _read(layer: Paged, pages: Pages) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, tokens, D]`` float32."""
    layout = pages.layout
    if not layout.has_tables:
        return read_pages(
            _bytes(layer, pages), layout, layer.fp8_scales.index_select(0, pages.segments)
        )
    inside = torch.arange(layout.tables.page_cells, device=layer.pool.device)
    cells = layer.pool.view(-1, layout.cell_bytes)
    tables = cells[pages.tables[:, None] + inside].flatten(1)
    return read_sign_pages(_bytes(layer, pages), tables, layout)


def _bytes(layer: Paged, pages: Pages) -> Tensor:
    """The pages' own bytes, ``[n, page_bytes]``."""
    cells = layer.pool.view(-1, pages.layout.cell_bytes)
    return _taken(cells, pages.cells).flatten(1)[:, : pages.layout.page_bytes]


def append_rows(layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
    """One token a sequence, ``[B, H, D]``, into the growing pages, and count it."""
    segments = growing.segments.long()
    tables_at, keys, values = growing.tables_at, keys.flatten(0, 1), values.flatten(0, 1)
    lengths = layer.lengths.index_select(0, segments.clamp(min=0))
    places = _places(growing, lengths)
    if (ended := segments < 0).any():
        every = segments, tables_at, keys, values, lengths, places
        segments, tables_at, keys, values, lengths, places = (x[~ended] for x in every)
    cells = layer.table.index_select(0, tables_at + places // BF16_PAGE)
    inside = places % BF16_PAGE
    if not inside.all():
        _clear(layer, cells[(inside == 0) & (places == lengths)].long())
    rows = layer.typed[1].view(-1, layer.head_dim)  # a cell is two of them
    at = 2 * cells + inside
    both = torch.cat([keys, values]).to(rows.dtype)
    rows.index_copy_(0, torch.cat([at, at + BF16_PAGE]).long(), both)
    layer.lengths.index_copy_(0, segments, torch.maximum(lengths, places + 1))


def _clear(layer: Paged, cells: Tensor) -> None:
    """Zeros into the growing pages that begin at some cells, in place of another's bytes."""
    layout = PageLayout(layer.head_dim)
    size = torch.arange(layout.page_cells, device=cells.device)
    layer.pool.view(-1, layout.cell_bytes)[cells[:, None] + size] = 0


def _places(growing: Growing, lengths: Tensor) -> Tensor:
    """Where each row's next token goes: at the end, or where a sliding layer says; counts it."""
    if growing.places is None or growing.entered is None:
        return lengths
    turn = growing.entered.long() % growing.places.shape[1]
    growing.entered.add_(1)
    return growing.places.gather(1, turn[:, None])[:, 0]
