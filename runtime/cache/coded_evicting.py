"""Evicting from pages of fewer bits, in which each token lies by itself.

A row's tokens lie in two segments: in its own format, and the newest in 16 bits. New tokens enter
the latter and move over when they lie behind the residual window, a window's at a time, as
``policies/slots.py`` stores them; without a window each moves over at once. Either kind may leave
at any step. How many of each a row holds is known on the device alone, and their sum on the host:
nobody waits for the device. Codes are written by what writes prompts, then copied one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.decode import FREE
from kvtune.policies.page_formats import BF16_PAGE, PAGE
from kvtune.runtime.cache.backend import Moves, Writing
from kvtune.runtime.cache.evicting import Evictor, Opening, alike, at, put_at
from kvtune.runtime.cache.leaving import shorten
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, GROWN, NOWHERE
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.token_bytes import Copies, token_at
from kvtune.runtime.cache.watching import columns_of


class CodedEvictor(Evictor):
    """As ``Evictor``; of the statistics' places the last are those of tokens in 16 bits."""

    def __init__(self, found: Sequence[Opening], heads: int, residual: int, window: int) -> None:
        """Take over prompts, of which nothing lies in 16 bits.

        Args:
            found: of one method, layout, the same heads and the same prompt length.
            heads: KV heads of the layer.
            residual: newest tokens that stay in 16 bits.
            window: tokens in 16 bits at most.
        """
        super().__init__(found, heads, window)
        self.layout, self.residual, self.window = found[0].layout, residual, window
        self.coded = self.driver.state.positions.shape[-1] - window  # places in the format
        self.newest = torch.zeros_like(self.held)  # tokens in 16 bits

    def enter(self, layer: PagedLayer, keys: Tensor, values: Tensor) -> None:
        """Note the newest token; move over what is old enough."""
        self.driver.prepare()
        self.driver.enter(self.coded + self.newest, keys[self._rows], values[self._rows])
        self.newest += 1
        if self.driver.state.generated % self._stride == 0:
            self._move_over(layer)

    def _columns_of(self, layer: PagedLayer) -> Tensor:
        """Where attention to each place is seen, ``[B, H, n]``: coded ones, then in 16 bits."""
        places = ((CODED, self.coded), (GROWN, self.window))
        return torch.cat([columns_of(layer, kind, self._rows, n) for kind, n in places], -1)

    def _let_one_go(self, layer: PagedLayer, gone: Tensor) -> None:
        """The token at a place ``[B, H, 1]`` of each head leaves the segment that it is in."""
        coded = gone < self.coded
        last = torch.where(coded, self.held, self.newest + self.coded) - 1
        self._fill(gone, last)
        self.held -= coded.long()
        self.newest -= (~coded).long()
        segments = (
            torch.where(coded, CODED * layer.rows, GROWN * layer.rows) + self._rows[..., None]
        )
        one_less = torch.full_like(self._row_numbers, -1)
        layer.paged.lengths.index_add_(0, segments.flatten(), one_less)
        sources, targets = (self._tokens(layer, place) for place in (last, gone))
        stays = ~coded | (last == gone)
        self._copy(layer, layer.pool.memory, sources.masked_fill(stays.flatten(), NOWHERE), targets)
        moves = ((x - self.coded).masked_fill(coded, 0).view(-1, 1).int() for x in (last, gone))
        layer.backend.move(layer.paged, layer.growing, Moves(self._row_numbers, *moves))
        shorten(layer, self.rows.ravel(), self.driver.drops.ravel())

    def _let_go(self, layer: PagedLayer, leaving: Tensor, most: int) -> None:
        """Tokens leave both segments, ``[B, H, n]`` bool over the places of both; of any head
        ``most`` at most."""
        self._leave_coded(layer, leaving[..., : self.coded], most)
        self._leave_window(layer, leaving[..., self.coded :], most)
        shorten(layer, self.rows.ravel(), self.driver.drops.ravel())

    def forget(self, rows: range) -> bool:
        """Evict no more from rows whose sequence has ended, and forget how many of their tokens lie
        in 16 bits; whether other rows are left."""
        stays = torch.from_numpy(~np.isin(self.rows[:, 0], rows))
        self.newest = self.newest[stays.to(self.newest.device)]
        return super().forget(rows)

    @property
    def _stride(self) -> int:
        """Tokens that move over together."""
        return max(self.residual, 1)

    def _leave_coded(self, layer: PagedLayer, leaving: Tensor, most: int) -> None:
        left = leaving.sum(-1, keepdim=True)
        moves = self._leave(slice(None, self.coded), leaving, self.held, left, most)
        self._shorten(layer, CODED, left)
        sources, targets = (self._tokens(layer, x) for x in (moves.sources, moves.targets))
        sources = sources.masked_fill((moves.sources == moves.targets).flatten(), NOWHERE)
        self._copy(layer, layer.pool.memory, sources, targets)

    def _leave_window(self, layer: PagedLayer, leaving: Tensor, most: int) -> None:
        left = leaving.sum(-1, keepdim=True)
        moves = self._leave(slice(self.coded, None), leaving, self.newest, left, most)
        self._shorten(layer, GROWN, left)
        layer.backend.move(layer.paged, layer.growing, moves)

    def _shorten(self, layer: PagedLayer, kind: int, left: Tensor) -> None:
        segments = kind * layer.rows + self._rows.flatten()
        layer.paged.lengths.index_add_(0, segments, left.flatten().int(), alpha=-1)

    def _move_over(self, layer: PagedLayer) -> None:
        """Old tokens in 16 bits take their place among the coded ones; the others stay."""
        state = self.driver.state
        window = state.positions[..., self.coded :]
        old = (window != FREE) & (window <= state.now - self.residual)
        count = old.sum(-1, keepdim=True)
        place = torch.arange(self.window, device=old.device)
        sources = place.where(old, place.new_tensor(self.window - 1)).sort(-1).values
        sources = sources[..., : self._stride]
        real = place[: self._stride] < count
        targets = self.held + place[: self._stride]
        self._store(layer, sources.where(real, 0), targets, real)  # place 0 always has a token
        read, last = self.coded + sources, self.coded + self.window - 1
        written = targets.where(real, read.new_tensor(last))
        read = read.where(real, read.new_tensor(last))
        for each in (state.positions, *state.statistics.values()):
            put_at(each, written, at(each, read))
        self.held += count
        self._shorten(layer, CODED, -count)
        self._leave_window(layer, old, self._stride)

    def _store(self, layer: PagedLayer, sources: Tensor, targets: Tensor, real: Tensor) -> None:
        """Quantise tokens at places ``[B, H, m]`` in 16 bits side by side; copy the real ones."""
        memory, many = layer.pool.memory, sources.numel()
        tokens = memory.view(torch.bfloat16).view(1, -1, layer.head_dim)
        first = layer.entries_of(GROWN, self._rows)[..., None]
        cells = layer.paged.table[first + sources // BF16_PAGE]
        chosen = (2 * cells + sources % BF16_PAGE).int().flatten()  # a cell is two tokens of bf16
        pages, size = -(-many // PAGE), self.layout.page_cells
        start = np.arange(pages) * PAGE
        counts = np.minimum(many - start, PAGE)
        columns = np.broadcast_arrays(0, start, counts, start // PAGE * size, 0)
        (records,) = sent([np.stack(columns, axis=1)], memory.device)
        between = memory.new_zeros(pages * self.layout.page_bytes)
        values = tokens[
            :, BF16_PAGE:
        ]  # of a page's keys, its values lie a page's tokens further on
        writing = Writing(self.layout, tokens, values, chosen, records, layer.fp8_scales)
        layer.backend.write(between, writing)
        number = torch.arange(many, device=memory.device)
        held = token_at(number // PAGE * size, number % PAGE)
        held = held.masked_fill(~real.flatten(), NOWHERE)
        self._copy(layer, between, held, self._tokens(layer, targets))

    def _tokens(self, layer: PagedLayer, places: Tensor) -> Tensor:
        """Tokens of coded segments in the pool, ``[n]``, by their places ``[B, H, m]``."""
        places = places.view(*self._rows.shape, -1).long()
        first, table = layer.entries_of(CODED, self._rows)[..., None], layer.paged.table
        cells = table[(first + places // PAGE).clamp_max(len(table) - 1)]
        return token_at(cells, places % PAGE).flatten()

    def _copy(self, layer: PagedLayer, source: Tensor, sources: Tensor, targets: Tensor) -> None:
        copies = Copies(source, layer.pool.memory, sources.flatten(), targets, self.layout)
        layer.backend.copy_tokens(copies)


def evictors(found: Sequence[Opening], layer: PagedLayer) -> list[Evictor]:
    """What evicts from a layer's pages: sequences and heads that are alike step together."""
    heads, grown = len(layer.options), layer.growing_layout
    return [
        Evictor(group, heads)
        if group[0].layout == grown
        else CodedEvictor(group, heads, layer.residual or 0, layer.window)
        for group in alike(found)
    ]
