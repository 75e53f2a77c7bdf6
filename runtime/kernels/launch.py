"""Launching decode attention: arguments checked, scratch allocated once, then pointers only."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.page_formats import is_signs, sign_bytes
from kvtune.policies.pages import KERNEL_HEAD_DIMS, PageLayout
from kvtune.profiles.tuned import find_tuned
from kvtune.runtime.kernels.tiles import Tiles, kind_of


@dataclass(frozen=True)
class Shape:
    """How the kernel is compiled; as given, the fastest on an H100 for every format.

    Args:
        warps: of a program.
        stages: steps in flight, the one in use included.
        programs: tiles to cut a layer into; None for ``tiles.PROGRAMS``.
        registers: of a thread at most, so that more programs run at once; None for as many as the
            compiler takes.
    """

    warps: int = 1
    stages: int = 3
    programs: int | None = None
    registers: int | None = None


BUILT_IN = Shape()


@functools.cache
def shape_for(pairs: tuple[int, ...], head_dim: int) -> Shape:
    """The fastest that was measured on the card of this process; else ``BUILT_IN``.

    Raises:
        KvtuneError: the card's ``kernels.yaml`` is not as it must be.
    """
    known = [field.name for field in fields(Shape)]
    tuned = find_tuned(torch.cuda.get_device_name(), known) if torch.cuda.is_available() else None
    best = tuned.decode.get((kind_of(pairs), head_dim)) if tuned else None
    return replace(BUILT_IN, **(best.shape if best else {}))


@dataclass(frozen=True)
class Paged:
    """One layer's cache as the kernel reads it.

    Args:
        pool: all pages, ``[bytes]`` uint8.
        table: ``[entries + TABLE_AHEAD]`` int32, each page's first cell, segment by segment.
        lengths: ``[segments]`` int32 tokens.
        fp8_scales: ``[segments, 2]`` float32.
        tiles: ``[n, 16]`` int32; see ``tiles.Tiles``.
        pairs: formats that occur.
        head_dim: D.
        growing_pages: table entries of each growing segment.
    """

    pool: Tensor
    table: Tensor
    lengths: Tensor
    fp8_scales: Tensor
    tiles: Tensor
    pairs: tuple[int, ...]
    head_dim: int
    growing_pages: int = 0

    @functools.cached_property
    def typed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pool as fp16, bf16 and fp8; made once, as a step's time is its host's calls."""
        kinds = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
        half, bfloat, eighth = (self.pool.view(kind) for kind in kinds)
        return half, bfloat, eighth

    @functools.cached_property
    def maps(self) -> dict[str, Any]:
        """What plain torch has found out about the pages; empty at first."""
        return {}


@dataclass(frozen=True)
class Seating:
    """Sequences of a step in seats of one layer's tables; the step's members may be captured.

    Args:
        seats: ``[sequences]`` int32, the seat of each; -1 where there is no sequence: nothing is
            then appended, and its output is left as it is.
        heads: KV heads.
        all_seats: how many there are.
        tiles: records of a seat in ``Paged.tiles``, the last number of each being its head.
        room: entries of a seat in the page table, of which growing segments are the first.
        growing: of these, entries of each head.
    """

    seats: Tensor
    heads: int
    all_seats: int
    tiles: int
    room: int
    growing: int

    @property
    def first_segment(self) -> int:
        """The first seat's first growing segment: behind all coded ones."""
        return self.all_seats * self.heads


class Scratch:
    """Where programs leave their parts; one serves all layers of a stream, one after another."""

    def __init__(self, rows: int, slots: int, group: int, head_dim: int, device: Any) -> None:
        """For up to ``slots`` tiles over ``rows`` rows of ``group`` query heads."""
        self.parts = torch.empty(slots, group, head_dim, device=device)
        self.lse = torch.empty(slots, group, device=device)
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        self.row_lse = torch.empty(rows, group, device=device)
        self._gathered = torch.empty(0, device=device)

    def gathered(self, signs: int) -> Tensor:
        """Room for sums by sign of every slot, ``[slots, signs, G]``; kept for the next call."""
        slots, group, _ = self.parts.shape
        if self._gathered.numel() < slots * signs * group:
            self._gathered = self.lse.new_empty(slots * signs * group)
        return self._gathered

    @staticmethod
    def fits(tiles: Tiles, rows: int, group: int, head_dim: int, device: Any) -> Scratch:
        """Enough for these tiles."""
        return Scratch(rows, len(tiles.records), group, head_dim, device)


def decode(
    q: Tensor,
    cache: Paged,
    scratch: Scratch,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    logits: Tensor | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """Attention of one new token a row, ``[rows, G, D]``; one launch.

    Args:
        q: ``[rows, G, D]`` contiguous.
        cache: of the layer.
        scratch: at least one slot a tile.
        scale: multiplies the logits.
        out: where to, any float type; like ``q`` unless given.
        lse: ``[rows, G]`` float32, is given the natural log-sum-exp.
        logits: ``[G, tokens that there are pages for]`` float32, is given the scaled logits, where
            they are wanted; ``exp(logits - lse)`` are attention weights, segment by segment.
        shape: how to compile; ``shape_for`` unless given.

    Raises:
        KvtuneError: a head dimension that the kernel is not made for.
    """
    rows, group, _ = q.shape
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(rows, group, device=q.device) if lse is None else lse
    _launch(
        (len(cache.tiles),), q, out, lse, cache, scratch, scale, group,
        shape=shape, logits=logits,
    )  # fmt: skip
    return out


def decode_seated(
    q: Tensor, cache: Paged, seating: Seating, scratch: Scratch, scale: float, out: Tensor
) -> None:
    """Attention of one new token a sequence that has a seat; one launch, which may be captured.

    Args:
        q: ``[sequences, Hq, D]``, contiguous but for its first stride.
        cache: of the layer.
        seating: of the sequences.
        scratch: one slot at least for each tile of every seat.
        scale: multiplies the logits.
        out: where to, ``[sequences, Hq, D]`` contiguous.

    Raises:
        KvtuneError: a head dimension that the kernel is not made for.
    """
    group = q.shape[1] // seating.heads
    _launch(
        (seating.tiles, len(q)), q, out, scratch.row_lse, cache, scratch, scale, group,
        seats=seating.seats, query_stride=q.stride(0), H=seating.heads, SEAT_TILES=seating.tiles,
    )  # fmt: skip


def _launch(
    grid: tuple[int, ...],
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    cache: Paged,
    scratch: Scratch,
    scale: float,
    group: int,
    shape: Shape | None = None,
    logits: Tensor | None = None,
    **seated: Any,
) -> None:
    from kvtune.runtime.kernels.decode import decode_attention

    head_dim = q.shape[-1]
    if head_dim not in KERNEL_HEAD_DIMS:
        raise KvtuneError(f"the kernels have heads of {KERNEL_HEAD_DIMS} channels, not {head_dim}")
    shape = shape or shape_for(cache.pairs, head_dim)
    heads = max(8, 1 << (group - 1).bit_length())
    signs = signs_of(cache.pairs, head_dim)
    # One warp's registers hold 1024 sums; more are spilled, and shared among warps are not.
    warps = shape.warps if head_dim * heads <= 1024 else max(shape.warps, 4)
    decode_attention[grid](
        q, out, lse, lse if logits is None else logits,
        *cache.typed,
        cache.tiles, cache.table, cache.lengths, cache.fp8_scales,
        scratch.parts, scratch.lse, scratch.gathered(signs), scratch.arrived, scale,
        D=head_dim, G=group, M=heads,
        PAIRS=cache.pairs, N_PAIRS=len(cache.pairs),
        STAGES=shape.stages, NATIVE=is_native(),
        EXPORT=0 if logits is None else logits.shape[1],
        SIGNS=signs, num_warps=warps, **_limits(shape), **seated,
    )  # fmt: skip


def _limits(shape: Shape) -> dict[str, int]:
    return {} if shape.registers is None else {"maxnreg": shape.registers}


@functools.cache
def is_native() -> bool:
    """Whether kernels are compiled; Triton's interpreter multiplies bf16 wrongly."""
    import triton

    return not triton.knobs.runtime.interpret


@functools.cache
def signs_of(pairs: tuple[int, ...], head_dim: int) -> int:
    """Signs of a value at most, where any are rows of signs."""
    names = [PageLayout.of(head_dim, pair).values for pair in pairs]
    return max((8 * sign_bytes(name, head_dim) for name in names if is_signs(name)), default=0)
