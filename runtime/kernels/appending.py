"""New tokens into 16-bit pages, rotated first or not; tokens moved; pages over from the host."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import BF16_PAGE
from kvtune.runtime.kernels.elementwise import rotated_halves

FETCHED_AT_ONCE = 512
"""Words of eight bytes that a program brings over from the host."""


@triton.jit
def append_token(keys, values, key_strides, value_strides, segments, tables_at, table, lengths,
                 pool_bf16, H: tl.constexpr, D: tl.constexpr,
                 places=None, entered=None, WINDOW: tl.constexpr = 0):  # fmt: skip
    """One new token of one row into its growing bf16 segment, whose pages are there already.

    It is appended; in a sliding layer it takes the place that ``places`` names.

    Args:
        keys, values: [B, H, D] by these strides, (B, H) each.
        segments: [rows] int32, the growing segment of each row; negative where its sequence has
            ended, and nothing is appended.
        tables_at: [rows] int32, its first entry in the page table.
        table: int32 cells.
        lengths: [segments] int32, counted up.
        pool_bf16: the pool's memory.
        places: [rows, WINDOW] int32.
        entered: [rows] int32 tokens so far, counted up.
        WINDOW: of a sliding layer; 0 for others.
    """
    row, channel = tl.program_id(0), tl.arange(0, D)
    key = tl.load(_head_of(keys, key_strides, row, H) + channel)
    value = tl.load(_head_of(values, value_strides, row, H) + channel)
    segment = tl.load(segments + row)
    if segment >= 0:
        page, slot, fresh = _take_place(row, segment, tables_at, table, lengths, pool_bf16,
                                        places, entered, WINDOW, D)  # fmt: skip
        tl.store(page + slot * D + channel, key.to(tl.bfloat16))
        _store_value(page, slot, fresh, value, D)


@triton.jit
def append_seated(keys, values, key_strides, value_strides, seats, table, lengths, pool_bf16,
                  FIRST_SEGMENT: tl.constexpr, ROOM: tl.constexpr, GROWING: tl.constexpr,
                  H: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``append_token`` of one KV head of one sequence that has a seat; nothing without one.

    Args:
        seats: [sequences] int32 the seat of each; negative where there is no sequence.
        FIRST_SEGMENT: the first seat's first growing segment.
        ROOM: page table entries of a seat.
        GROWING: of each head's growing segment; those of all heads are a seat's first ones.
    """
    member, head = tl.program_id(0), tl.program_id(1)
    seat = tl.load(seats + member)
    if seat >= 0:
        channel = tl.arange(0, D)
        key = tl.load(keys + member * key_strides[0] + head * key_strides[1] + channel)
        value = tl.load(values + member * value_strides[0] + head * value_strides[1] + channel)
        segment = FIRST_SEGMENT + seat * H + head
        place = tl.load(lengths + segment)
        cell = tl.load(table + seat * ROOM + head * GROWING + place // BF16_PAGE)
        tl.store(lengths + segment, place + 1)
        page, slot = pool_bf16 + cell.to(tl.int64) * (2 * D), place % BF16_PAGE
        tl.store(page + slot * D + channel, key.to(tl.bfloat16))
        _store_value(page, slot, slot == 0, value, D)


@triton.jit
def append_rotated(queries, rotated, cos, sin, query_strides, angle_stride,
                   keys, values, key_strides, value_strides, segments, tables_at, table, lengths,
                   pool_bf16, H: tl.constexpr, D: tl.constexpr,
                   places=None, entered=None, WINDOW: tl.constexpr = 0,
                   G: tl.constexpr = 1, MEMBERS: tl.constexpr = 1):  # fmt: skip
    """``append_token`` of a key that is rotated first; other programs rotate the row's queries.

    Args:
        queries: [B, H * G, D] by these strides, (B, H * G).
        rotated: [B, H * G, D].
        cos, sin: [B, D] by ``angle_stride``.
        G: queries of a row.
        MEMBERS: the same or more, a power of two.
    """
    row = tl.program_id(0)
    cos += (row // H) * angle_stride
    sin += (row // H) * angle_stride
    if tl.program_id(1):
        _rotate_queries(queries, rotated, query_strides, cos, sin, row, H, D, G, MEMBERS)
    else:
        value = tl.load(_head_of(values, value_strides, row, H) + tl.arange(0, D))
        source = _head_of(keys, key_strides, row, H)
        half = tl.arange(0, D // 2)
        first, second = rotated_halves(source, cos, sin, half, D)
        segment = tl.load(segments + row)
        if segment >= 0:
            page, slot, fresh = _take_place(row, segment, tables_at, table, lengths, pool_bf16,
                                            places, entered, WINDOW, D)  # fmt: skip
            target = page + slot * D + half
            tl.store(target, first.to(tl.bfloat16))
            tl.store(target + D // 2, second.to(tl.bfloat16))
            _store_value(page, slot, fresh, value, D)


@triton.jit
def _rotate_queries(queries, rotated, strides, cos, sin, row, H: tl.constexpr, D: tl.constexpr,
                    G: tl.constexpr, MEMBERS: tl.constexpr):  # fmt: skip
    """Of one row; the last one more than once where they are no power of two."""
    head = (row % H) * G + tl.minimum(tl.arange(0, MEMBERS), G - 1)[:, None]
    source = queries + (row // H) * strides[0] + head * strides[1]
    half = tl.broadcast_to(tl.arange(0, D // 2)[None, :], [MEMBERS, D // 2])
    first, second = rotated_halves(source, cos, sin, half, D)
    target = rotated + ((row // H) * (H * G) + head) * D + half
    tl.store(target, first)
    tl.store(target + D // 2, second)


@triton.jit
def _head_of(tensor, strides, row, H: tl.constexpr):
    """A row's new token."""
    return tensor + (row // H) * strides[0] + (row % H) * strides[1]


@triton.jit
def _take_place(row, segment, tables_at, table, lengths, pool_bf16, places, entered,
                WINDOW: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """The new token's page, its slot, and whether it is the page's first; counts it."""
    length = tl.load(lengths + segment)
    place = length
    if WINDOW:
        before = tl.load(entered + row)
        place = tl.load(places + row * WINDOW + before % WINDOW)
        tl.store(entered + row, before + 1)
    cell = tl.load(table + tl.load(tables_at + row) + place // BF16_PAGE)
    tl.store(lengths + segment, tl.maximum(length, place + 1))
    slot = place % BF16_PAGE
    return pool_bf16 + cell.to(tl.int64) * (2 * D), slot, (slot == 0) & (place == length)


@triton.jit
def _store_value(page, slot, fresh, value, D: tl.constexpr):
    """What another format left behind might read as not a number: a first token clears the rest."""
    channel, token = tl.arange(0, D), tl.arange(0, BF16_PAGE)[:, None]
    first = page + BF16_PAGE * D
    if fresh:
        rest = first + token * D + channel[None, :]
        tl.store(rest, tl.zeros([BF16_PAGE, D], tl.bfloat16), mask=token > 0)
    tl.store(first + slot * D + channel, value.to(tl.bfloat16))


@triton.jit
def move_tokens(rows, sources, targets, moves, tables_at, table, pool_bf16, D: tl.constexpr):
    """One token of a row's bf16 segment to another place of it; from a place to itself is none.

    Args:
        rows: [n] int32.
        sources, targets: [n, moves] int32 places of each; no place is both read and written.
        moves: of each row.
        tables_at, table, pool_bf16: as for ``append_token``.
    """
    move = tl.program_id(0)
    source, target = tl.load(sources + move), tl.load(targets + move)
    if source != target:
        table += tl.load(tables_at + tl.load(rows + move // moves))
        both, channel = tl.arange(0, 2)[:, None], tl.arange(0, D)[None, :]
        place = both * (BF16_PAGE * D) + channel
        page = tl.load(table + source // BF16_PAGE).to(tl.int64) * (2 * D)
        token = tl.load(pool_bf16 + page + (source % BF16_PAGE) * D + place)
        page = tl.load(table + target // BF16_PAGE).to(tl.int64) * (2 * D)
        tl.store(pool_bf16 + page + (target % BF16_PAGE) * D + place, token)


@triton.jit
def fetch_blocks(
    addresses, places, cells, pool,
    SLAB: tl.constexpr, CELL: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of one block of pages, from pinned host memory into the pool.

    Args:
        addresses: [slabs] int64, where each begins.
        places: [blocks] int64, slab * SLAB + offset; negative for none.
        cells: [blocks] int32, where to.
        pool: its memory as int64.
        SLAB: bytes of a slab.
        CELL: int64 words of a cell.
        WORDS: int64 words of a block.
        BLOCK: int64 words of a part.
    """
    block = tl.program_id(0)
    place = tl.load(places + block)
    if place >= 0:
        source = (tl.load(addresses + place // SLAB) + place % SLAB).to(tl.pointer_type(tl.int64))
        target = pool + tl.load(cells + block).to(tl.int64) * CELL
        word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = word < WORDS
        tl.store(target + word, tl.load(source + word, mask=there, other=0), mask=there)
