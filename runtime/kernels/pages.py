"""Writing pages: tokens are gathered, quantised and packed in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    BF16,
    HALF,
    PAGE,
    bits_of,
    code_bytes,
    drawn_in,
    fields_of,
    first_channel,
    group_of,
    groups_of,
    is_blocks,
    is_by_token,
    is_float,
    is_turned,
    page_tokens,
    parts_of,
    plain_code,
    plane_at,
    scale_bytes,
)
from kvtune.runtime.kernels.turning import negative_where_odd, signs

RECORD = tl.constexpr(5)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to even as torch does


@triton.jit
def store_pages(
    keys, values, stride_row, stride_token, chosen, records, fp8_scales,
    pool_bytes, pool_half, pool_bf16, pool_fp8,
    D: tl.constexpr, KEY_CODE: tl.constexpr, VALUE_CODE: tl.constexpr,
):  # fmt: skip
    """One page of kept tokens of one head, but for keys or values in blocks.

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
    if not is_blocks(KEYS):
        _store_keys(keys, source, count, start, scales,
                    pool_bytes, pool_half, pool_bf16, pool_fp8,
                    D, KEYS, is_turned(KEY_CODE))  # fmt: skip
    if not is_blocks(VALUES):
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
    if is_float(KEYS):
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
    if is_float(VALUES):
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
