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
    fields_of,
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

    Of three bits their third bits lie beside them; levels of two bits and more are looked up at
    once.

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
        if bits_of(CODE) == 4:
            units = tl.inline_asm_elementwise(
                all_levels(4), "=&r,=&r,=&r,=&r,r", [units[0]],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        elif bits_of(CODE) == 3:
            units = tl.inline_asm_elementwise(
                all_levels(3), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [units[0], units[1]],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                       tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            units = tl.inline_asm_elementwise(
                all_levels(2), "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [units[0]],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                       tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
    return units


@triton.jit
def unpacked(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, CODE: tl.constexpr,
             NATIVE: tl.constexpr):  # fmt: skip
    """One field of one half page's bytes as fp16: ``unit_of`` too small."""
    if _at_once(CODE, NATIVE):
        number = units[fields_of(CODE) * HALF_PAGE + FIELD]
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
    return native and table_of(code) == "normal" and bits_of(code) > 1


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
    level = half_bits(0, bits_of(code))
    return _signed(f"mov.b32 number, {level * 0x10001};", _moved("sign", "$1", 15 - at, 0x8000))


@triton.constexpr_function
def _signed(number, sign):
    """PTX that puts a sign before a number."""
    names = "sign, number"
    return f"{{ .reg .b32 {names}; {number} {sign} or.b32 $0, number, sign; }}"


@triton.constexpr_function
def _moved(into, source, by, mask):
    """PTX that moves both lanes of two units up, or down, and masks them."""
    shift = f"shl.b32 {into}, {source}, {by};" if by >= 0 else f"shr.b32 {into}, {source}, {-by};"
    return f"{shift} and.b32 {into}, {into}, {mask * 0x10001};"


@triton.constexpr_function
def half_bits(place, bits):
    """The bits of one of a normal number's magnitudes as a 16-bit float."""
    import struct

    from kvtune.policies.formats.normal_codes import magnitudes

    return struct.unpack("<H", struct.pack("<e", magnitudes(bits)[place]))[0]


@triton.constexpr_function
def all_levels(bits):
    """PTX that looks up the levels of all codes of two units, by half page, then field.

    A permutation of bytes finds four codes' lower bytes, or upper ones, among eight: so many levels
    have two and three bits with their signs, and four bits without, which come to them afterwards.
    Codes are brought into nibbles, those of both units in turn, so that two other permutations
    give a number of either unit in each register.
    """
    count = 4 if bits == 4 else 8
    names = "m, n, y, z, r0, r1, la, lb, ha, hb, lo, hi"
    text = f"{{ .reg .b32 {names};"
    for name, first, shift in (("la", 0, 0), ("lb", 4, 0), ("ha", 0, 8), ("hb", 4, 8)):
        text += f" mov.b32 {name}, {_four(first, shift, bits)};"
    for part in range(count // 4):
        text += _nibbles(part, bits, count)
        text += " shr.b32 m, n, 12; and.b32 m, m, 0xF0F0; and.b32 r0, n, 0x0F0F; or.b32 r0, r0, m;"
        text += " shr.b32 m, n, 16; and.b32 m, m, 0xF0F0; shr.b32 r1, n, 4;"
        text += " and.b32 r1, r1, 0x0F0F; or.b32 r1, r1, m;"
        for turn in range(2):
            field = turn if bits == 4 else 2 * turn + part
            text += f" prmt.b32 lo, la, lb, r{turn}; prmt.b32 hi, ha, hb, r{turn};"
            for half, order in ((0, "0x5140"), (1, "0x7362")):
                out = f"${half * (count // 2) + field}"
                text += f" prmt.b32 {out}, lo, hi, {order};"
                if bits == 4:
                    text += f" shl.b32 m, $4, {12 - 8 * half - 4 * field};"
                    text += f" and.b32 m, m, 0x80008000; or.b32 {out}, {out}, m;"
    return text + " }"


@triton.constexpr_function
def _nibbles(part, bits, count):
    """PTX that leaves in ``n`` a nibble of each of some fields: of both halves of both units."""
    if bits == 4:
        return " and.b32 n, $4, 0x77777777;"
    text = f" shr.b32 n, ${count}, {2 * part}; and.b32 n, n, 0x33333333;"
    if bits == 3:  # a third bit goes to where the nibble of its code has it
        low, high = (2, 9) if part == 0 else (0, 7)
        text += f" shl.b32 y, ${count + 1}, {low}; and.b32 y, y, 0x00440044;"
        text += f" shl.b32 z, ${count + 1}, {high}; and.b32 z, z, 0x44004400;"
        text += " or.b32 n, n, y; or.b32 n, n, z;"
    return text


@triton.constexpr_function
def _four(first, shift, bits):
    """A byte of each of four levels, as one word: of magnitudes where there are four bits."""
    word = 0
    for n in range(4):
        code, signed = first + n, bits < 4
        most = 1 << (bits - 1)
        level = half_bits(code % most if signed else code, bits)
        level |= (0x8000 if code // most % 2 else 0) if signed else 0
        word |= (level >> shift & 255) << (8 * n)
    return word


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
