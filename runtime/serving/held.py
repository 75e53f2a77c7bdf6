"""What one request of a serving engine holds, on the host: its pages, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.page_formats import BF16_PAGE
from kvtune.runtime.cache.segments import Ints, runs
from kvtune.runtime.serving.blocks import with_room_ahead
from kvtune.runtime.serving.pages import RequestPages

KINDS = 2
"""Of a served request's segments: coded and growing; none settles."""


@dataclass
class Stored:
    """Pages of a request whose prompt has been read by every layer.

    Args:
        coded_tokens: in the prompt's format ``[L, H]``.
        coded_pages: that hold them ``[L, H]``.
        coded_cells: first cells of those pages, head after head.
        exact: prompt tokens in growing pages ``[L, H]``.
        cells: first cells of growing pages ``[L, H, most]``.
        have: how many of them there are ``[L, H]``.
        fp8_scales: ``[L, kinds, H, 2]``.
        tables: first cells of the tables of coded pages ``[L, H]``; 0 where they have none.
        room: tokens after the prompt that have pages.
    """

    coded_tokens: Ints
    coded_pages: Ints
    coded_cells: Ints
    exact: Ints
    cells: Ints
    have: Ints
    fp8_scales: Tensor
    tables: Ints
    room: int = 0

    @classmethod
    def of(cls, parts: Sequence[Stored]) -> Stored:
        """Layers that were stored some at a time."""
        most = max(part.cells.shape[-1] for part in parts)
        cells = [np.pad(p.cells, ((0, 0), (0, 0), (0, most - p.cells.shape[-1]))) for p in parts]
        return cls(
            np.concatenate([part.coded_tokens for part in parts]),
            np.concatenate([part.coded_pages for part in parts]),
            np.concatenate([part.coded_cells for part in parts]),
            np.concatenate([part.exact for part in parts]),
            np.concatenate(cells),
            np.concatenate([part.have for part in parts]),
            torch.cat([part.fp8_scales for part in parts]),
            np.concatenate([part.tables for part in parts]),
        )

    def pages_for(self, new_tokens: int) -> Ints:
        """Growing pages of each head with so many tokens after the prompt, ``[L, H]``."""
        return -(-(self.exact + new_tokens) // BF16_PAGE)

    def reserve(
        self, new_tokens: int, pages: RequestPages, page_cells: int
    ) -> tuple[Ints, Ints, Ints]:
        """Take pages for so many tokens after the prompt.

        Returns:
            Of every page taken: its head among all layers', its place there, its first cell.
        """
        wanted = self.pages_for(new_tokens)
        if wanted.max() > self.cells.shape[-1]:
            room = int(wanted.max()) - self.cells.shape[-1]
            self.cells = np.pad(self.cells, ((0, 0), (0, 0), (0, room)))
        more = np.maximum(wanted - self.have, 0).ravel()
        head, place = np.repeat(np.arange(more.size), more), runs(more, self.have.ravel())
        cells = pages.take(int(more.sum()), page_cells)
        self.cells.reshape(more.size, -1)[head, place] = cells
        self.have, self.room = np.maximum(self.have, wanted), new_tokens
        return head, place, cells


@dataclass(eq=False)
class Held:
    """What is held of one request.

    Args:
        prompt_tokens: read in one piece.
        tokens: seen so far.
        pages: its own.
        budgets: of each layer's heads, ``[L, H]``, none beyond the prompt.
        parts: layers that are in pages.
        appended: tokens that steps have added after the prompt.
        stored: all layers, once they have read the prompt.
    """

    prompt_tokens: int
    tokens: int
    pages: RequestPages
    budgets: Ints
    parts: list[Stored] = field(default_factory=list)
    appended: int = 0
    stored: Stored | None = None

    def settled(self) -> Stored:
        """All layers side by side; the prompt must have been read."""
        if self.stored is None:
            self.stored = Stored.of(self.parts)
            self.parts = []
        return self.stored

    @property
    def reserved(self) -> int:
        """Tokens after the prompt that have pages when the next one has been added."""
        return with_room_ahead(self.appended + 1)
