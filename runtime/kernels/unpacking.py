"""Numbers out of the units that hold their codes.

Integers are masked out as they lie and read as numbers below the normal ones: tensor cores multiply
such numbers exactly, so that a mask is all the unpacking, and what a field is too small by is put
right afterwards (``unit_of``). Small floats are moved to where a 16-bit float has its exponent;
levels of a normal number are looked up in registers, a byte at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    bits_of,
    field_bits,
    plane_at,
    table_of,
)


@triton.constexpr_function
def unit_of(field, code):
    """What one step of a field counts, where the field was read as it lies."""
    shifts = {"integers": 24 - field * field_bits(code), "e2m1": 14, "e4m3": 8, "normal": 0}
    return 2.0 ** shifts[table_of(code)]


@triton.constexpr_function
def field_share(field, code):
    """What a field is multiplied by to count as the lowest one does."""
    return unit_of(field, code) / unit_of(0, code)


@triton.jit
def load_units(pool_half, start, token, channel, TOKEN: tl.constexpr, CHANNEL: tl.constexpr,
               D: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Units of half a page's tokens by some channels, as ``unpacked`` takes them.

    Of three bits their third bits lie beside them; levels of four bits are looked up at once.

    Args:
        pool_half, start: the pool's memory, and the first byte of the codes.
        token, channel: [32, 1] and [1, W], or the other way round.
        TOKEN, CHANNEL: units from one to the next.
    """
    place = token * TOKEN + channel * CHANNEL
    units = (tl.load(pool_half + start // 2 + place),)
    if bits_of(CODE) == 3:
        plane = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + start + plane_at(D)
        units = units + (tl.load(plane + place).to(tl.uint16),)
    if _at_once(CODE, NATIVE):
        units = tl.inline_asm_elementwise(
            _all_levels(), "=&r,=&r,=&r,=&r,r", [units[0]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return units


@triton.jit
def unpacked(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, CODE: tl.constexpr,
             NATIVE: tl.constexpr):  # fmt: skip
    """One field of one half page's bytes as fp16: ``unit_of`` too small."""
    if _at_once(CODE, NATIVE):
        number = units[2 * HALF_PAGE + FIELD]
    elif NATIVE:
        if bits_of(CODE) == 3:
            number = tl.inline_asm_elementwise(
                _unpack(HALF_PAGE, FIELD, CODE), "=r,r,r", [units[0], units[1]],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            number = tl.inline_asm_elementwise(
                _unpack(HALF_PAGE, FIELD, CODE), "=r,r", [units[0]],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        number = _plainly(units, HALF_PAGE, FIELD, CODE)
    return number


@triton.jit
def _plainly(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, CODE: tl.constexpr):
    """The same without assembly, for Triton's interpreter."""
    BITS: tl.constexpr = bits_of(CODE)
    LOW: tl.constexpr = (1 << field_bits(CODE)) - 1
    code = (
        units[0].to(tl.uint16, bitcast=True) >> (8 * HALF_PAGE + FIELD * field_bits(CODE))
    ) & LOW
    if BITS == 3:
        code |= ((units[1] >> (2 * FIELD + HALF_PAGE)) & 1) << 2
    if table_of(CODE) == "integers":
        number = (code << (FIELD * field_bits(CODE))).to(tl.uint16).to(tl.float16, bitcast=True)
    elif table_of(CODE) == "normal":
        MOST: tl.constexpr = 1 << (BITS - 1)
        number = tl.full([1, 1], magnitude(0, CODE), tl.float16)
        for place in tl.static_range(1, MOST):
            larger = tl.full([1, 1], magnitude(place, CODE), tl.float16)
            number = tl.where((code & (MOST - 1)) == place, larger, number)
        number = tl.where(code >= MOST, -number, number)
    else:
        SIGN: tl.constexpr = 1 << (BITS - 1)
        moved = ((code & SIGN) << (16 - BITS)) | ((code & (SIGN - 1)) << moved_by(CODE))
        number = moved.to(tl.uint16).to(tl.float16, bitcast=True)
    return number


@triton.constexpr_function
def magnitude(place, code):
    """One of the magnitudes that codes of a normal number have."""
    from kvtune.policies.formats.normal_codes import magnitudes

    return magnitudes(code % 8 + 1)[place]


@triton.constexpr_function
def moved_by(code):
    """Where the lowest bit of a small float's magnitude goes among 16."""
    return 9 if table_of(code) == "e2m1" else 7


@triton.constexpr_function
def _at_once(code, native):
    """Whether all fields are looked up together."""
    return native and table_of(code) == "normal" and bits_of(code) == 4


@triton.constexpr_function
def _unpack(half, field, code):
    """PTX that unpacks one field of two units."""
    width, at = field_bits(code), 8 * half + field * field_bits(code)
    kind = table_of(code)
    if kind == "integers" and bits_of(code) == 3:
        return _mask_with_third(half, ((1 << width) - 1) << (field * width), 4 << (2 * field))
    if kind == "integers":
        return mask_of(half, ((1 << width) - 1) << (field * width))
    if kind != "normal":
        mask = ((1 << (bits_of(code) - 1)) - 1) << moved_by(code)
        magnitude_of = _moved("number", "$1", moved_by(code) - at, mask)
        return _signed(magnitude_of, _moved("sign", "$1", 16 - bits_of(code) - at, 0x8000))
    level = [_half_bits(place, code) for place in range(1 << (bits_of(code) - 1))]
    if bits_of(code) == 3:
        pairs = [level[n] | level[n + 1] << 16 for n in (0, 2)]
        found = (
            _moved("low", "$1", -at, 3) + " prmt.b32 low, low, 0, 0x4420;"
            " mad.lo.u32 low, low, 0x22, 0x1010;"
            f" mov.b32 first, {pairs[0]}; mov.b32 second, {pairs[1]};"
            " prmt.b32 number, first, second, low;"
        )
        return _signed(found, _moved("sign", "$2", 15 - (2 * field + half), 0x8000))
    if bits_of(code) == 2:
        found = (
            _moved("low", "$1", -at, 1)
            + f" mad.lo.u32 number, low, {level[1] - level[0]}, {level[0] * 0x10001};"
        )
        return _signed(found, _moved("sign", "$1", 14 - at, 0x8000))
    return _signed(f"mov.b32 number, {level[0] * 0x10001};", _moved("sign", "$1", 15 - at, 0x8000))


@triton.constexpr_function
def _signed(number, sign):
    """PTX that puts a sign before a number."""
    names = "low, sign, first, second, number"
    return f"{{ .reg .b32 {names}; {number} {sign} or.b32 $0, number, sign; }}"


@triton.constexpr_function
def _moved(into, source, by, mask):
    """PTX that moves both lanes of two units up, or down, and masks them."""
    shift = f"shl.b32 {into}, {source}, {by};" if by >= 0 else f"shr.b32 {into}, {source}, {-by};"
    return f"{shift} and.b32 {into}, {into}, {mask * 0x10001};"


@triton.constexpr_function
def _half_bits(place, code):
    """The bits of a magnitude as a 16-bit float."""
    import struct

    return struct.unpack("<H", struct.pack("<e", magnitude(place, code)))[0]


@triton.constexpr_function
def _all_levels():
    """PTX that looks up the levels of the four codes of four bits in either of two units.

    A permutation of bytes finds four codes' lower bytes, or upper ones, in eight magnitudes; others
    bring a level's bytes, and then both units' levels, together.
    """
    text = "{ .reg .b32 t, u, la, lb, ha, hb, l0, h0, l1, h1, a, b, c, d, s;"
    text += f" mov.b32 la, {_four(0, 0)}; mov.b32 lb, {_four(4, 0)};"
    text += f" mov.b32 ha, {_four(0, 8)}; mov.b32 hb, {_four(4, 8)};"
    text += " and.b32 t, $4, 0x77777777; shr.b32 u, t, 16;"
    text += " prmt.b32 l0, la, lb, t; prmt.b32 h0, ha, hb, t;"
    text += " prmt.b32 l1, la, lb, u; prmt.b32 h1, ha, hb, u;"
    text += " prmt.b32 a, l0, h0, 0x5140; prmt.b32 b, l1, h1, 0x5140;"
    text += " prmt.b32 c, l0, h0, 0x7362; prmt.b32 d, l1, h1, 0x7362;"
    for n in range(4):
        both = "a, b" if n < 2 else "c, d"
        half = "0x5410" if n % 2 == 0 else "0x7632"
        text += f" shl.b32 s, $4, {12 - 4 * n}; and.b32 s, s, 0x80008000;"
        text += f" prmt.b32 ${n}, {both}, {half}; or.b32 ${n}, ${n}, s;"
    return text + " }"


@triton.constexpr_function
def _four(first, shift):
    """A byte of each of four magnitudes of codes of four bits, as one word."""
    return sum((_half_bits(first + n, 3) >> shift & 255) << (8 * n) for n in range(4))


@triton.constexpr_function
def mask_of(half, mask):
    """PTX that masks one field of two units."""
    if half == 0:
        return f"and.b32 $0, $1, {mask * 0x10001};"
    return f"{{ .reg .b32 high; shr.b32 high, $1, 8; and.b32 $0, high, {mask * 0x10001}; }}"


@triton.constexpr_function
def _mask_with_third(half, mask, above):
    """PTX that masks one field of two units and puts its third bit above it."""
    field = "mov.b32 low, $1;" if half == 0 else "shr.b32 low, $1, 8;"
    third = f"shl.b32 high, $2, {2 - half};"
    return (
        f"{{ .reg .b32 low, high; {field} {third} and.b32 low, low, {mask * 0x10001}; "
        f"and.b32 high, high, {above * 0x10001}; or.b32 $0, low, high; }}"
    )
