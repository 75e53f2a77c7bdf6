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
def _seen(reading):
    """Groups that are loaded of a token, some of them twice: of fewer than a load a thread the
    compiler thinks so little that it makes one for every number that they scale."""
    groups = groups_of(reading)
    return groups if groups == 1 else max(groups, 4)


@triton.constexpr_function
def is_bfloat(reading):
    """Whether floats are bf16, not fp16."""
    return reading // 524288 % 2 == 1


@triton.constexpr_function
def has_words(reading):
    """Whether the codes of 32 elements of a row are whole words of 32 bits."""
    return reading // 1048576 % 2 == 1


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
def _pair(pool, table, offset, mask, D: tl.constexpr):
    """A group's scale and offset at some words, as float32."""
    typed = pool.to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(typed + _place(table, offset, mask, D) // 4, mask=mask, other=0)
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(
        tl.float32
    )


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
def prepared(pool, table, section, D: tl.constexpr, READING: tl.constexpr):
    """What is the same in all steps: of each channel [D], where its codes and scales begin, bytes
    of a group and whether it is wide; and what codes stand for, where that is looked up."""
    levels = ()
    if has_levels(READING):
        first = tl.load(section + LEVELS)
        for code in tl.static_range(1 << bits_of(READING)):
            levels = levels + (_half(pool, table, first + 2 * code, first >= 0, D),)
    return _channel_rows(pool, table, section, D, READING), levels


@triton.jit
def _channel_rows(pool, table, section, D: tl.constexpr, READING: tl.constexpr):
    """Of each channel [D]: the first byte of its codes and of its scales, the bytes of one of its
    groups of codes, and whether it is among the wide ones, whose rows lie apart."""
    channel = tl.arange(0, D)
    codes, scales = tl.load(section + CODES), tl.load(section + SCALES)
    groups, size = tl.load(section + GROUPS), tl.load(section + GROUP_BYTES)
    row, sizes = channel, tl.zeros_like(channel) + size
    before, same = tl.zeros_like(channel), tl.zeros_like(channel)
    codes, scales = tl.zeros_like(channel) + codes, tl.zeros_like(channel) + scales
    if widths_of(READING) == "channels":
        places = tl.load(section + WIDTHS)
        for n in tl.range(0, tl.load(section + WIDE_COUNT)):
            place = _short(pool, table, places + 2 * n, True, D)
            before += (channel > place).to(tl.int32)
            same += (channel == place).to(tl.int32)
        row = tl.where(same > 0, before, channel - before)
        sizes = tl.where(same > 0, tl.load(section + WIDE_BYTES), sizes)
        codes = tl.where(same > 0, tl.load(section + WIDE_CODES), codes)
        scales = tl.where(same > 0, tl.load(section + WIDE_SCALES), scales)
    return codes + row * groups * sizes, scales + row * groups * 4, sizes, same > 0


@triton.jit
def numbers_of(pool, table, section, known, first, there, D: tl.constexpr, READING: tl.constexpr,
               ACROSS: tl.constexpr):  # fmt: skip
    """Numbers of a step float32, [32, D]; [D, 32] where ACROSS.

    Args:
        pool, table: the pool's memory, and the first cells of the part's pages.
        section: the record.
        known: of ``prepared``.
        first: the step's first token among the section's.
        there: [32], which are tokens; others are zeros, or anything that is finite.
    """
    if is_by_channel(READING):
        numbers = _of_channels(pool, table, section, known, first, there, D, READING)
        if not ACROSS:
            numbers = tl.trans(numbers)
    else:
        numbers = _of_tokens(pool, table, section, known[1], first, there, D, READING)
        if ACROSS:
            numbers = tl.trans(numbers)
    return numbers


@triton.jit
def _of_channels(pool, table, section, known, first, there, D: tl.constexpr, READING: tl.constexpr):
    """[D, 32]; the step lies within one group of each channel's tokens."""
    codes, scales, sizes, wide = known[0]
    group = tl.load(section + GROUP)
    which = first // group
    along = first - which * group
    start, end = codes + which * sizes, codes + (which + 1) * sizes
    code = _run(pool, table, start + along * bits_of(READING) // 8, end, STEP, bits_of(READING), D,
                READING)  # fmt: skip
    if widths_of(READING) == "channels":
        twice = _run(pool, table, start + along * bits_of(READING) // 4, tl.where(wide, end, 0),
                     STEP, 2 * bits_of(READING), D, READING)  # fmt: skip
        code = tl.where(wide[:, None], twice, code)
    level = _levels(known[1], code, READING)
    scale, offset = _pair(pool, table, scales + which * 4, codes >= 0, D)
    return level * scale[:, None] + offset[:, None]


@triton.jit
def _of_tokens(pool, table, section, levels, first, there, D: tl.constexpr, READING: tl.constexpr):
    """[32, D]: floats, or codes in groups of each token's channels."""
    row, channel = tl.load(section + FIRST) + first + tl.arange(0, STEP), tl.arange(0, D)
    codes = tl.load(section + CODES)
    if bits_of(READING) == 16:
        mask = there[:, None] & (channel >= 0)[None, :]
        numbers = _floats(pool, table, codes + 2 * (row[:, None] * D + channel[None, :]), mask,
                          D, READING)  # fmt: skip
    else:
        ALL: tl.constexpr = groups_of(READING)
        SEEN: tl.constexpr = _seen(READING)
        group = (tl.arange(0, SEEN) * ALL // SEEN)[None, :]
        scales = tl.load(section + SCALES) + 4 * (row[:, None] * ALL + group)
        scale, offset = _pair(pool, table, scales, there[:, None] & (group >= 0), D)
        if widths_of(READING) == "tokens":
            code, widths = _wide_tokens(pool, table, section, codes, row, first, there, D)
            spread = scale
            scale = spread / tl.exp2(widths.to(tl.float32))[:, None]
            offset -= spread * 0.5
        else:
            size = ALL * tl.load(section + GROUP_BYTES)
            start = codes + row * size
            code = _run(pool, table, start, tl.where(there, start + size, 0), D, bits_of(READING),
                        D, READING)  # fmt: skip
        level = _levels(levels, code, READING)
        numbers = level * _spread(scale, D, SEEN) + _spread(offset, D, SEEN)
    return numbers


@triton.jit
def _run(pool, table, start, end, COUNT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
         READING: tl.constexpr):  # fmt: skip
    """So many codes of each row [R] from a byte on, [R, COUNT]; anything where bytes have ended."""
    if has_words(READING):
        WORDS: tl.constexpr = COUNT * BITS // 32
        at = start[:, None] + 4 * tl.arange(0, WORDS)[None, :]
        real = at < end[:, None]
        typed = pool.to(tl.pointer_type(tl.int32), bitcast=True)
        some = tl.load(typed + _place(table, at, real, D) // 4, mask=real, other=0)
        code = _unfolded(some, COUNT, 32 // BITS, BITS)
    else:  # eight codes are as many bytes as a code has bits, which are read one by one
        at = start[:, None] + BITS * tl.arange(0, COUNT // 8)[None, :]
        some = tl.zeros_like(at).to(tl.int64 if BITS > 4 else tl.int32)
        for byte in tl.static_range(BITS):
            real = at + byte < end[:, None]
            read = tl.load(pool + _place(table, at + byte, real, D), mask=real, other=0)
            some |= read.to(some.dtype) << (8 * byte)
        code = _unfolded(some, COUNT, 8, BITS)
    return code


@triton.jit
def _unfolded(words, COUNT: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr):
    """Codes [R, COUNT] out of integers that hold so many each, the first one lowest."""
    shifted = words[:, :, None] >> (tl.arange(0, EACH) * BITS)[None, None, :]
    return tl.reshape((shifted & ((1 << BITS) - 1)).to(tl.int32), [words.shape[0], COUNT])


@triton.jit
def _wide_tokens(pool, table, section, codes, row, first, there, D: tl.constexpr):
    """Codes [32, D] of tokens that have widths of their own [32], and these."""
    places = tl.load(section + WIDTHS) + row
    widths = tl.load(pool + _place(table, places, there, D), mask=there, other=0).to(tl.int32)
    sizes = (widths * D + 7) // 8
    begin = _word(pool, table, tl.load(section + STARTS) + 4 * (first // STEP), D)
    start = (codes + begin + tl.cumsum(sizes, 0) - sizes)[:, None]
    bits, bit = widths[:, None], tl.arange(0, D)[None, :] * widths[:, None]
    byte, shift, mask = start + bit // 8, bit % 8, there[:, None] & (bit >= 0)
    code = tl.load(pool + _place(table, byte, mask, D), mask=mask, other=0).to(tl.int32)
    more = mask & (shift + bits > 8)
    rest = tl.load(pool + _place(table, byte + 1, more, D), mask=more, other=0)
    return ((code | (rest.to(tl.int32) << 8)) >> shift) & ((1 << bits) - 1), widths


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
    """Numbers of 16 bits at some bytes, fp16 or bf16 as READING says, as float32; zeros where
    ``mask`` is not set."""
    if is_bfloat(READING):
        typed = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        typed = pool.to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(typed + _place(table, offset, mask, D) // 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def _levels(levels, code, READING: tl.constexpr):
    """What codes stand for: chosen bit by bit where that is looked up."""
    if has_levels(READING):
        left = levels
        for bit in tl.static_range(bits_of(READING)):
            is_set, chosen = ((code >> bit) & 1) == 1, ()
            for pair in tl.static_range(1 << (bits_of(READING) - bit - 1)):
                chosen = chosen + (tl.where(is_set, left[2 * pair + 1], left[2 * pair]),)
            left = chosen
        level = left[0]
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
