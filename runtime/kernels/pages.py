"""Writing pages: gather, quantise and pack in one pass; append a token, rotated first; move one."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    BF16,
    BF16_PAGE,
    FP8,
    HALF,
    PAGE,
    bits_of,
    code_bytes,
    drawn_in,
    fields_of,
    first_channel,
    group_of,
    groups_of,
    is_by_token,
    is_turned,
    page_tokens,
    parts_of,
    plain_code,
    plane_at,
    scale_bytes,
)
from kvtune.runtime.kernels.elementwise import rotated_halves
from kvtune.runtime.kernels.turning import negative_where_odd, signs

RECORD = tl.constexpr(5)
FETCHED_AT_ONCE = 512
"""Words of eight bytes that a program brings over from the host."""
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to even as torch does


@triton.jit
def store_pages(
    keys, values, stride_row, stride_token, chosen, records, fp8_scales,
    pool_bytes, pool_half, pool_bf16, pool_fp8,
    D: tl.constexpr, KEY_CODE: tl.constexpr, VALUE_CODE: tl.constexpr,
):  # fmt: skip
    """One page of kept tokens of one head.

    Args:
        keys, values: [rows, P, D] by these strides, the same for both.
        chosen: int32, kept token indices, page by page.
        records: [pages, 5] int32: row, first place in ``chosen``, tokens, cell, segment.
        fp8_scales: [segments, 2] float32.
        pool_*: the pool's memory, as four types.
    """
    KEYS: tl.constexpr = plain_code(KEY_CODE)
    VALUES: tl.constexpr = plain_code(VALUE_CODE)
    record = records + tl.program_id(0) * RECORD
    row, count = tl.load(record).to(tl.int64), tl.load(record + 2)
    start = tl.load(record + 3).to(tl.int64) * (4 * D)
    TOKENS: tl.constexpr = page_tokens(KEYS, VALUES)
    token = tl.arange(0, TOKENS)
    index = tl.load(chosen + tl.load(record + 1) + token, mask=token < count, other=0)
    source = row * stride_row + index.to(tl.int64) * stride_token
    scales = fp8_scales + 2 * tl.load(record + 4)
    VALUES_AT: tl.constexpr = code_bytes(KEYS, D, TOKENS) + scale_bytes(KEYS, D)
    _store_keys(keys, source, count, start, scales,
                pool_bytes, pool_half, pool_bf16, pool_fp8,
                D, KEYS, is_turned(KEY_CODE))  # fmt: skip
    _store_values(values, source, count, start + VALUES_AT, scales + 1,
                  pool_bytes, pool_half, pool_bf16, pool_fp8,
                  D, VALUES, is_turned(VALUE_CODE))  # fmt: skip


@triton.jit
def _store_keys(keys, source, count, start, fp8_scale,
                pool_bytes, pool_half, pool_bf16, pool_fp8,
                D: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Codes token by token; integers share a scale a channel, or as values do."""
    W: tl.constexpr = D // fields_of(KEYS)
    channel, token = tl.arange(0, W), tl.arange(0, source.shape[0])
    if KEYS >= FP8:
        place = start + token[:, None] * W + channel[None, :]
        _store_floats(_gather(keys, source, count, 0, W, D, False), start, place, fp8_scale,
                      pool_bf16, pool_fp8, KEYS)  # fmt: skip
    elif is_by_token(KEYS):
        place = start + 2 * (token % HALF) * W + token // HALF
        _store_by_token(keys, source, count, place, start, pool_bytes, pool_half,
                        D, KEYS, 2, W, TURNED)  # fmt: skip
    else:
        packed = tl.zeros([PAGE, W], tl.int32)
        scales = pool_half + (start + code_bytes(KEYS, D)) // 2 + channel * fields_of(KEYS)
        for field in tl.static_range(fields_of(KEYS)):
            rows = _gather(keys, source, count, field * W, W, D, TURNED)
            real = (token < count)[:, None]
            low = tl.min(tl.where(real, rows, float("inf")), 0)
            high = tl.max(tl.where(real, rows, -float("inf")), 0)
            scale, offset = _grid(low, high, bits_of(KEYS), drawn_in(KEYS, TURNED))
            tl.store(scales + field, scale)
            tl.store(scales + field + D, offset)
            codes = _codes(rows, scale[None, :], offset[None, :], bits_of(KEYS))
            packed |= _laid(codes, field, KEYS)
        place = start + 2 * (token % HALF) * W + token // HALF
        _store_bytes(pool_bytes, packed, place, channel, 2, start + plane_at(D), W, W, KEYS)


@triton.jit
def _store_values(values, source, count, start, fp8_scale,
                  pool_bytes, pool_half, pool_bf16, pool_fp8,
                  D: tl.constexpr, VALUES: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Codes channel by channel; integers share a scale a token and 64 channels."""
    if VALUES >= FP8:
        channel, token = tl.arange(0, D), tl.arange(0, source.shape[0])
        across = token[:, None] + channel[None, :] * PAGE
        along = token[:, None] * D + channel[None, :]
        _store_floats(_gather(values, source, count, 0, D, D, False), start,
                      start + (along if VALUES == BF16 else across), fp8_scale,
                      pool_bf16, pool_fp8, VALUES)  # fmt: skip
    else:
        place = start + _by_unit(tl.arange(0, PAGE))
        _store_by_token(values, source, count, place, start, pool_bytes, pool_half,
                        D, VALUES, PAGE, 1, TURNED)  # fmt: skip


@triton.jit
def _store_by_token(tensor, source, count, place, start, pool_bytes, pool_half,
                    D: tl.constexpr, CODE: tl.constexpr, STRIDE: tl.constexpr,
                    TOKEN: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Integers that share a scale a token and 64 channels.

    Args:
        place: [64], each token's first byte in the pool; its others follow every STRIDE bytes.
        start: the first byte of all.
        TOKEN: units from one token to the next.
    """
    FIELDS: tl.constexpr = fields_of(CODE)
    BITS: tl.constexpr = bits_of(CODE)
    W: tl.constexpr = D // parts_of(CODE, D)
    GROUPS: tl.constexpr = groups_of(CODE, D)
    DRAWN_IN: tl.constexpr = drawn_in(CODE, TURNED)
    channel = tl.arange(0, W)
    scales = pool_half + (start + code_bytes(CODE, D)) // 2 + _by_unit(tl.arange(0, PAGE))
    for group in tl.static_range(GROUPS):
        rows = _gather(tensor, source, count, group * PAGE, D // GROUPS, D, TURNED)
        scale, offset = _grid(tl.min(rows, 1), tl.max(rows, 1), BITS, DRAWN_IN)
        tl.store(scales + group * PAGE, scale)
        tl.store(scales + (GROUPS + group) * PAGE, offset)
    for chunk in tl.static_range(parts_of(CODE, D) // FIELDS):
        packed = tl.zeros([PAGE, W], tl.int32)
        for field in tl.static_range(FIELDS):
            first = group_of(chunk * FIELDS + field, CODE, D) * PAGE
            rows = _gather(tensor, source, count, first, D // GROUPS, D, TURNED)
            scale, offset = _grid(tl.min(rows, 1), tl.max(rows, 1), BITS, DRAWN_IN)
            first = first_channel(chunk * FIELDS + field, CODE, D)
            rows = _gather(tensor, source, count, first, W, D, TURNED)
            packed |= _laid(_codes(rows, scale[:, None], offset[:, None], BITS), field, CODE)
        _store_bytes(pool_bytes, packed, place, chunk * W + channel, STRIDE, start + plane_at(D),
                     TOKEN, W, CODE)  # fmt: skip


@triton.jit
def _laid(codes, field, CODE: tl.constexpr):
    """Codes in their field of a byte, and third bits eight above it."""
    if bits_of(CODE) == 3:
        laid = ((codes & 3) | ((codes & 4) << 6)) << (2 * field)
    else:
        laid = codes << (field * bits_of(CODE))
    return laid


@triton.jit
def _store_bytes(pool_bytes, packed, place, channel, STRIDE: tl.constexpr, plane,
                 TOKEN: tl.constexpr, W: tl.constexpr, CODE: tl.constexpr):  # fmt: skip
    """A page's bytes of some channels, [64, W]; of three bits, the plane of third bits too.

    Args:
        place: [64], each token's first byte; a channel's follow every STRIDE bytes.
        channel: [W].
        plane: the first byte of third bits, which the tokens t and t + 32 share; those of the
            next token follow after TOKEN bytes.
    """
    byte = place[:, None] + channel[None, :] * STRIDE
    tl.store(pool_bytes + byte, packed.to(tl.uint8))
    if bits_of(CODE) == 3:
        third = (packed >> 8) << (tl.arange(0, PAGE) // HALF)[:, None]
        both = tl.sum(tl.reshape(third, [2, HALF, W]), 0)
        byte = tl.arange(0, HALF)[:, None] * TOKEN + channel[None, :] * (STRIDE // 2)
        tl.store(pool_bytes + plane + byte, both.to(tl.uint8))


@triton.jit
def _by_unit(token):
    """Where a token lies among a page's, of which t and t + 32 lie side by side."""
    return 2 * (token % HALF) + token // HALF


@triton.jit
def _gather(tensor, source, count, FIRST, W: tl.constexpr, D: tl.constexpr,
            TURNED: tl.constexpr):  # fmt: skip
    """Channels ``FIRST`` to ``FIRST + W`` of a page's tokens, [tokens, W] float32, zeros beyond.

    TURNED: of the tokens times a Hadamard matrix.
    """
    channel, token = tl.arange(0, W), tl.arange(0, source.shape[0])
    real = (token < count)[:, None]
    if TURNED:
        among = tl.arange(0, HALF)
        rows = tl.zeros([PAGE, W], tl.float32)
        for start in tl.range(0, D, HALF, num_stages=1):  # compiled once, not unrolled
            place = source[:, None] + (start + among)[None, :]
            some = tl.load(tensor + place, mask=real, other=0).to(tl.float32)
            matrix = signs(among, channel + FIRST)
            coarse = some.to(tl.float16)  # all of what was bf16 or fp16
            rest = (some - coarse.to(tl.float32)).to(tl.float16)
            sign = negative_where_odd((channel + FIRST) & start).to(tl.float32)
            rows += tl.dot(rest, matrix, tl.dot(coarse, matrix)) * sign[None, :]
        rows = rows * (D**-0.5)
    else:
        place = source[:, None] + FIRST + channel[None, :]
        rows = tl.load(tensor + place, mask=real, other=0).to(tl.float32)
    return rows


@triton.jit
def _store_floats(rows, start, place, fp8_scale, pool_bf16, pool_fp8, CODE: tl.constexpr):
    if CODE == BF16:
        tl.store(pool_bf16 + start // 2 + (place - start), rows.to(tl.bfloat16))
    else:
        scaled = tl.div_rn(rows, tl.zeros_like(rows) + tl.load(fp8_scale))
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        tl.store(pool_fp8 + place, scaled.to(tl.float8e4nv))


@triton.jit
def _grid(low, high, BITS: tl.constexpr, DRAWN_IN: tl.constexpr):
    """Scale and offset in 16 bits, of codes from 0 to 2^bits - 1 between ends that are drawn in."""
    if DRAWN_IN > 0:
        less = (high - low) * DRAWN_IN
        low, high = low + less, high - less
    offset = low.to(tl.float16)
    levels = tl.full(low.shape, (1 << BITS) - 1, tl.float32)
    return tl.div_rn(high - offset.to(tl.float32), levels).to(tl.float16), offset


@triton.jit
def _codes(rows, scale, offset, BITS: tl.constexpr):
    scale = scale.to(tl.float32)
    step = tl.where(scale > 0, scale, 1.0) + tl.zeros_like(rows)  # a constant group has no spread
    exact = tl.div_rn(rows - offset.to(tl.float32), step)
    return tl.minimum(tl.maximum((exact + ROUNDER) - ROUNDER, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def append_token(keys, values, key_strides, value_strides, segments, tables_at, table, lengths,
                 pool_bf16, H: tl.constexpr, D: tl.constexpr,
                 places=None, entered=None, WINDOW: tl.constexpr = 0):  # fmt: skip
    """One new token of one row into its growing bf16 segment, whose pages are there already.

    It is appended; in a sliding layer it takes the place that ``places`` names.

    Args:
        keys, values: [B, H, D] by these strides, (B, H) each.
        segments: [rows] int32, the growing segment of each row.
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
    page, slot, fresh = _take_place(row, segments, tables_at, table, lengths, pool_bf16,
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
        page, slot, fresh = _take_place(row, segments, tables_at, table, lengths, pool_bf16,
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
def _take_place(row, segments, tables_at, table, lengths, pool_bf16, places, entered,
                WINDOW: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """The new token's page, its slot, and whether it is the page's first; counts it."""
    segment = tl.load(segments + row)
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
