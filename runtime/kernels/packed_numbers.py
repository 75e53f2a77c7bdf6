"""Numbers of 32 tokens out of packed buffers, whichever way ``policies.packed`` says they lie.

A section's record, int32: where each of ``policies.packed.BUFFERS`` begins among the part's bytes;
then elements of a group, groups of a row, bytes of a group's codes, and of one of those that are
wide, how many channels are wide, which of the buffers' tokens is the section's first, and where the
part's pages begin in the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(32)
RANK = tl.constexpr(16)  # columns of low-rank factors at most
CHANNELS = tl.constexpr(1024)  # what a token counts in an outlier's place

SECTION_FIELDS = tl.constexpr(18)
CODES, SCALES, LEVELS, WIDTHS, WIDE_CODES, WIDE_SCALES, LEFT, RIGHT, STARTS, PLACES, OUTLIERS = (
    tl.constexpr(n) for n in range(11)
)
GROUP, GROUPS, GROUP_BYTES, WIDE_BYTES, WIDE_COUNT, FIRST, TABLE_AT = (
    tl.constexpr(n) for n in range(11, 18)
)


@triton.constexpr_function
def bits_of(reading):
    """Bits of a code; of the narrower ones where there are two widths."""
    return reading % 32


@triton.constexpr_function
def is_by_channel(reading):
    """Whether a row is a channel's tokens."""
    return reading // 32 % 2 == 1


@triton.constexpr_function
def widths_of(reading):
    """Which rows have widths of their own."""
    return ("alike", "channels", "tokens")[reading // 64 % 4]


@triton.constexpr_function
def has_levels(reading):
    """Whether codes are looked up."""
    return reading // 256 % 2 == 1


@triton.constexpr_function
def has_outliers(reading):
    """Whether single numbers are added."""
    return reading // 512 % 2 == 1


@triton.constexpr_function
def rank_of(reading):
    """Columns of low-rank factors."""
    return reading // 1024 % 32


@triton.constexpr_function
def groups_of(reading):
    """Groups of a token's channels."""
    return 2 ** (reading // 32768 % 16)


@triton.constexpr_function
def is_bfloat(reading):
    """Whether floats are bf16, not fp16."""
    return reading // 524288 % 2 == 1


@triton.constexpr_function
def _goes_on(reading):
    """Whether a code may begin in one byte and end in the next."""
    return widths_of(reading) == "tokens" or bits_of(reading) in (3, 5, 6, 7)


@triton.jit
def _place(table, offset, mask, D: tl.constexpr):
    """Where a byte of a part lies in the pool: its pages are of four cells of 4 D bytes."""
    cell = tl.load(table + offset // (16 * D), mask=mask, other=0)
    return cell.to(tl.int64) * (4 * D) + offset % (16 * D)


@triton.jit
def _half(pool, table, offset, mask, D: tl.constexpr):
    """Floats of 16 bits at some bytes, as float32."""
    typed = pool.to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(typed + _place(table, offset, mask, D) // 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def _word(pool, table, offset, D: tl.constexpr):
    """One integer of 32 bits."""
    typed = pool.to(tl.pointer_type(tl.int32), bitcast=True)
    cell = tl.load(table + offset // (16 * D)).to(tl.int64)
    return tl.load(typed + (cell * (4 * D) + offset % (16 * D)) // 4)


@triton.jit
def _short(pool, table, offset, mask, D: tl.constexpr):
    """Integers of 16 bits."""
    typed = pool.to(tl.pointer_type(tl.int16), bitcast=True)
    return tl.load(typed + _place(table, offset, mask, D) // 2, mask=mask, other=0).to(tl.int32)


@triton.jit
def channel_rows(pool, table, section, D: tl.constexpr, READING: tl.constexpr):
    """Of each channel [D]: where its codes and scales begin, bits of a code, bytes of a group."""
    channel = tl.arange(0, D)
    codes, scales = tl.load(section + CODES), tl.load(section + SCALES)
    groups, size = tl.load(section + GROUPS), tl.load(section + GROUP_BYTES)
    row, sizes, bits = channel, tl.zeros_like(channel) + size, tl.zeros_like(channel)
    bits += bits_of(READING)
    codes, scales = tl.zeros_like(channel) + codes, tl.zeros_like(channel) + scales
    if widths_of(READING) == "channels":
        before, same = tl.zeros_like(channel), tl.zeros_like(channel)
        places = tl.load(section + WIDTHS)
        for n in tl.range(0, tl.load(section + WIDE_COUNT)):
            place = _short(pool, table, places + 2 * n, True, D)
            before += (channel > place).to(tl.int32)
            same += (channel == place).to(tl.int32)
        row = tl.where(same > 0, before, channel - before)
        sizes = tl.where(same > 0, tl.load(section + WIDE_BYTES), sizes)
        codes = tl.where(same > 0, tl.load(section + WIDE_CODES), codes)
        scales = tl.where(same > 0, tl.load(section + WIDE_SCALES), scales)
        bits = tl.where(same > 0, 2 * bits, bits)
    return codes + row * groups * sizes, scales + row * groups * 4, bits, sizes


@triton.jit
def numbers_of(pool, table, section, rows, first, there, D: tl.constexpr, READING: tl.constexpr,
               ACROSS: tl.constexpr):  # fmt: skip
    """Numbers of a step float32, [32, D]; [D, 32] where ACROSS.

    Args:
        pool, table: the pool's memory, and the first cells of the part's pages.
        section: the record.
        rows: of ``channel_rows``.
        first: the step's first token among the section's.
        there: [32], which are tokens; others are zeros, or anything that is finite.
    """
    if is_by_channel(READING):
        numbers = _of_channels(pool, table, section, rows, first, there, D, READING)
        if not ACROSS:
            numbers = tl.trans(numbers)
    else:
        numbers = _of_tokens(pool, table, section, first, there, D, READING)
        if ACROSS:
            numbers = tl.trans(numbers)
    return numbers


@triton.jit
def _of_channels(pool, table, section, rows, first, there, D: tl.constexpr, READING: tl.constexpr):
    """[D, 32]; the step lies within one group of each channel's tokens."""
    group = tl.load(section + GROUP)
    which = first // group
    along = first - which * group + tl.arange(0, STEP)
    mask = there[None, :] & (rows[2] > 0)[:, None]
    bits = rows[2][:, None]
    start = (rows[0] + which * rows[3])[:, None]
    code = _codes(pool, table, start, along[None, :] * bits, bits, mask, D, READING)
    level = _levels(pool, table, section, code, mask, D, READING)
    scales = rows[1] + which * 4
    real = rows[2] > 0
    scale, offset = _half(pool, table, scales, real, D), _half(pool, table, scales + 2, real, D)
    return level * scale[:, None] + offset[:, None]


@triton.jit
def _of_tokens(pool, table, section, first, there, D: tl.constexpr, READING: tl.constexpr):
    """[32, D]: floats, or codes in groups of each token's channels."""
    row, channel = tl.load(section + FIRST) + first + tl.arange(0, STEP), tl.arange(0, D)
    mask = there[:, None] & (channel >= 0)[None, :]
    codes = tl.load(section + CODES)
    if bits_of(READING) == 16:
        numbers = _floats(pool, table, codes + 2 * (row[:, None] * D + channel[None, :]), mask,
                          D, READING)  # fmt: skip
    else:
        ALL: tl.constexpr = groups_of(READING)
        WIDTH: tl.constexpr = D // ALL
        group = tl.arange(0, ALL)[None, :]
        scales = tl.load(section + SCALES) + 4 * (row[:, None] * ALL + group)
        each = there[:, None] & (group >= 0)
        scale = _half(pool, table, scales, each, D)
        offset = _half(pool, table, scales + 2, each, D)
        if widths_of(READING) == "tokens":
            widths = tl.load(section + WIDTHS) + row
            bits = tl.load(pool + _place(table, widths, there, D), mask=there, other=0)
            bits = bits.to(tl.int32)
            sizes = (bits * D + 7) // 8
            begin = _word(pool, table, tl.load(section + STARTS) + 4 * (first // STEP), D)
            start = (codes + begin + tl.cumsum(sizes, 0) - sizes)[:, None]
            code = _codes(pool, table, start, channel[None, :] * bits[:, None], bits[:, None],
                          mask, D, READING)  # fmt: skip
            spread = scale
            scale = spread / tl.exp2(bits.to(tl.float32))[:, None]
            offset -= spread * 0.5
        else:
            size = tl.load(section + GROUP_BYTES)
            start = codes + row[:, None] * (ALL * size) + (channel // WIDTH)[None, :] * size
            bit = (channel % WIDTH)[None, :] * bits_of(READING)
            code = _codes(pool, table, start, bit, bits_of(READING), mask, D, READING)
        level = _levels(pool, table, section, code, mask, D, READING)
        numbers = level * _spread(scale, D, ALL) + _spread(offset, D, ALL)
    return numbers


@triton.jit
def _spread(scales, D: tl.constexpr, ALL: tl.constexpr):
    """Scales [32, groups] to their channels."""
    if ALL == 1:
        spread = scales
    else:
        wide = tl.broadcast_to(scales[:, :, None], [STEP, ALL, D // ALL])
        spread = tl.reshape(wide, [STEP, D])
    return spread


@triton.jit
def _floats(pool, table, offset, mask, D: tl.constexpr, READING: tl.constexpr):
    if is_bfloat(READING):
        typed = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        typed = pool.to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(typed + _place(table, offset, mask, D) // 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def _codes(pool, table, start, bit, bits, mask, D: tl.constexpr, READING: tl.constexpr):
    """Codes of so many bits, of which each begins so many bits behind a byte."""
    byte, shift = start + bit // 8, bit % 8
    code = tl.load(pool + _place(table, byte, mask, D), mask=mask, other=0).to(tl.int32)
    if _goes_on(READING):
        more = mask & (shift + bits > 8)
        rest = tl.load(pool + _place(table, byte + 1, more, D), mask=more, other=0)
        code |= rest.to(tl.int32) << 8
    return (code >> shift) & ((1 << bits) - 1)


@triton.jit
def _levels(pool, table, section, code, mask, D: tl.constexpr, READING: tl.constexpr):
    """What codes stand for."""
    if has_levels(READING):
        level = _half(pool, table, tl.load(section + LEVELS) + 2 * code, mask, D)
    else:
        level = code.to(tl.float32)
    return level


@triton.jit
def left_factors(pool, table, section, first, there, D: tl.constexpr, READING: tl.constexpr):
    """[32, 16]: a step's rows of the left factor, zeros beyond its columns."""
    row, column = tl.load(section + FIRST) + first + tl.arange(0, STEP), tl.arange(0, RANK)
    mask = there[:, None] & (column < rank_of(READING))[None, :]
    place = row[:, None] * rank_of(READING) + column[None, :]
    return _half(pool, table, tl.load(section + LEFT) + 2 * place, mask, D)


@triton.jit
def right_factors(pool, table, section, D: tl.constexpr, READING: tl.constexpr):
    """[16, D]: the transposed right factor."""
    channel, column = tl.arange(0, D)[None, :], tl.arange(0, RANK)[:, None]
    mask = (column < rank_of(READING)) & (channel >= 0)
    place = channel * rank_of(READING) + column
    return _half(pool, table, tl.load(section + RIGHT) + 2 * place, mask, D)


@triton.jit
def outliers_of(pool, table, section, first, D: tl.constexpr):
    """Where a step's outliers begin in their lists, and where they end."""
    at = tl.load(section + STARTS) + 4 * ((tl.load(section + FIRST) + first) // STEP)
    return _word(pool, table, at, D), _word(pool, table, at + 4, D)


@triton.jit
def some_outliers(pool, table, section, at, end, D: tl.constexpr, SOME: tl.constexpr):
    """Token of the step, channel and number [SOME] of outliers from ``at`` on; zeros beyond."""
    which = at + tl.arange(0, SOME)
    real = which < end
    place = _short(pool, table, tl.load(section + PLACES) + 2 * which, real, D)
    number = _half(pool, table, tl.load(section + OUTLIERS) + 2 * which, real, D)
    return place // CHANNELS, place % CHANNELS, number
