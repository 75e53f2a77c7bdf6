"""The interface that reads and writes pages of the KV cache, and the tables that it is called with.

``triton_backend.py`` implements it by kernels on a GPU, ``plain_backend.py`` in plain torch; both
write the same pages and return the same attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from kvtune.policies.pages import PageLayout
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.token_bytes import Copies
from kvtune.runtime.kernels.launch import Paged, Scratch, Seating
from kvtune.runtime.rotation import Rotation


@dataclass(frozen=True)
class FittedTables:
    """Tables that are fitted to all of a head's tokens.

    Args:
        cells: the first cell of each segment's, by the number of the segment.
        weights: ``[segments, D]``, by which keys are multiplied before they are coded, and divided
            where they are read; or None.
    """

    cells: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class Writing:
    """Kept tokens of several heads on their way into pages of one layout.

    Args:
        layout: of the pages.
        keys: ``[H, P, D]``.
        values: ``[H, P, D]``.
        chosen: int32 token indices, one list after another.
        records: ``[pages, 5]`` int32: head, first place in ``chosen``, tokens, cell, segment.
        fp8_scales: ``[segments, 2]`` float32.
        fitted: of pages that are read by tables, where these go; else None.
    """

    layout: PageLayout
    keys: Tensor
    values: Tensor
    chosen: Tensor
    records: Tensor
    fp8_scales: Tensor
    fitted: FittedTables | None = None


@dataclass(frozen=True)
class Growing:
    """Each row's segment of new tokens.

    Args:
        segments: ``[rows]`` int32; negative where the row's sequence has ended.
        tables_at: ``[rows]`` int32, its first entry in the page table.
        places: of a sliding layer, ``[rows, window]`` int32: where the g-th new token goes.
        entered: likewise, ``[rows]`` int32 new tokens so far.
    """

    segments: Tensor
    tables_at: Tensor
    places: Tensor | None = None
    entered: Tensor | None = None


@dataclass(frozen=True)
class Moves:
    """Tokens of some rows that take other places of their growing segments.

    Args:
        rows: ``[n]`` int32.
        sources: ``[n, m]`` int32 places; where it is the target too, nothing moves.
        targets: ``[n, m]`` int32 places, none of which is another's source.
    """

    rows: Tensor
    sources: Tensor
    targets: Tensor


@dataclass(frozen=True)
class AttentionSeen:
    """Logits and log-sum-exp of one decode step: ``exp(logits - lse)`` are its attention weights.

    Args:
        lse: ``[rows, G]`` float32, natural log-sum-exp.
        logits: ``[G, tokens that there are pages for]`` float32, scaled, segment by segment; beyond
            a segment's tokens anything. None where they are not wanted.
    """

    lse: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Fetching:
    """Blocks of 64 tokens on their way from the host to the device.

    Args:
        places: in the host's pool, ``[n]`` int64; -1 copies nothing.
        cells: first ones of the pool, ``[n]`` int32.
        layout: of the blocks' pages, which lie side by side.
    """

    places: Tensor
    cells: Tensor
    layout: PageLayout


class Backend(Protocol):
    """Writes, appends and attends; every method changes pages only where it says so.

    Attributes:
        has_kernels: whether Triton's kernels do the work. A graph may capture it; others of them
            then sum columns of attention, and read packed buffers where they lie.
    """

    has_kernels: ClassVar[bool]

    def write(self, pool: Tensor, writing: Writing) -> None:
        """Gather, quantise and pack whole pages."""

    def append(self, layer: Paged, growing: Growing, keys: Tensor, values: Tensor) -> None:
        """Put one token a sequence, ``[B, H, D]``, into growing segments; counts their lengths."""

    def append_rotated(
        self, layer: Paged, growing: Growing, rotation: Rotation, values: Tensor
    ) -> Tensor:
        """Rotate queries and keys, append keys and values, and return the rotated queries,
        ``[B, Hq, 1, D]``."""

    def move(self, layer: Paged, growing: Growing, moves: Moves) -> None:
        """Move tokens within growing segments; lengths are the caller's."""

    def attend(
        self,
        q: Tensor,
        layer: Paged,
        scratch: Scratch,
        scale: float,
        seen: AttentionSeen | None = None,
    ) -> Tensor:
        """Output ``[rows, G, D]`` of ``q`` like it; fills in ``seen`` where it is given."""

    def append_seated(self, layer: Paged, seating: Seating, keys: Tensor, values: Tensor) -> None:
        """Put one token, ``[B, H, D]``, into the growing segments of each sequence with a seat."""

    def attend_seated(
        self, q: Tensor, layer: Paged, seating: Seating, scratch: Scratch, scale: float, out: Tensor
    ) -> None:
        """Fill in ``out`` ``[B, Hq, D]`` where a sequence has a seat, of ``q`` like it."""

    def fetch(self, pool: Tensor, host: HostPool, fetching: Fetching) -> None:
        """Copy blocks from the host into the pool."""

    def copy_tokens(self, copies: Copies) -> None:
        """Copy single tokens between pages whose tokens share no scale."""
