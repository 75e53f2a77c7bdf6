"""What kernels know of a format by its number (``layout.KEY_CODES``), and fields out of units.

A *part* of a key or value is a run of its channels that share a field of their bytes and a group:
what is multiplied at once. Parts go by chunk, then field.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
BF16_PAGE = tl.constexpr(16)
HALF = tl.constexpr(32)
BF16 = tl.constexpr(16)
FP8 = tl.constexpr(9)


@triton.constexpr_function
def bits_of(code):
    """Bits an element; keys by token are called one less than values, and three bits six."""
    even = code + code % 2
    return 8 if code == 9 else 3 if even == 6 else even


@triton.constexpr_function
def field_bits(code):
    """Bits of an element in a field of a byte: the third of three lies in a plane apart."""
    return 2 if bits_of(code) == 3 else bits_of(code)


@triton.constexpr_function
def is_by_token(code):
    """Whether these are integer keys with a scale a token, as values have."""
    return code < 8 and code % 2 == 1


@triton.constexpr_function
def plain_code(code):
    """The number of a format without its rotation."""
    return code % 32


@triton.constexpr_function
def is_turned(code):
    """Whether a format is rotated."""
    return code >= 32


@triton.constexpr_function
def is_signs(code):
    """Whether a page holds rows of signs."""
    return code % 32 > 16


@triton.constexpr_function
def sign_bytes(code, head_dim):
    """Bytes of a token's signs; a format's number is five above its bits in eighths."""
    return (code % 32 - 5) * head_dim // 64


@triton.constexpr_function
def drawn_in(code, turned):
    """What either end of a group's range loses; see ``layout.CLIP``."""
    clip = {2: 0.7, 3: 0.85}.get(bits_of(code), 1.0) if turned else 1.0
    return (1 - clip) / 2


@triton.constexpr_function
def fields_of(code):
    """Channels that share a byte."""
    return max(8 // field_bits(code), 1)


@triton.constexpr_function
def parts_of(code, head_dim):
    """Runs of channels with neither two fields nor two groups of a token; one of a float's."""
    return 1 if code > 8 else max(fields_of(code), head_dim // 64)


@triton.constexpr_function
def key_parts(code, head_dim):
    """Of a key: its fields alone where groups are of channels."""
    return parts_of(code, head_dim) if is_by_token(code) else fields_of(code)


@triton.constexpr_function
def first_channel(part, code, head_dim):
    """The first channel that a part of a packed row holds."""
    fields = fields_of(code)
    return part % fields * (head_dim // fields) + part // fields * (
        head_dim // parts_of(code, head_dim)
    )


@triton.constexpr_function
def groups_of(code, head_dim):
    """Groups of a token's channels that share an offset; one, of nothing, for floats."""
    return (head_dim + 63) // 64 if code <= 8 else 1


@triton.constexpr_function
def group_of(part, code, head_dim):
    """Of the channels of a part."""
    return first_channel(part, code, head_dim) // 64


@triton.constexpr_function
def page_tokens(keys, values):
    """Tokens of a page of these formats."""
    return 16 if keys == values == 16 else 64


@triton.constexpr_function
def code_bytes(code, head_dim, tokens=64):
    """Bytes of the codes of a page of so many tokens."""
    if code % 32 > 16:
        return tokens * (code % 32 - 5) * head_dim // 64
    return tokens * head_dim * bits_of(code) // 8


@triton.constexpr_function
def plane_at(head_dim):
    """Where the plane of third bits begins among a page's codes, in bytes."""
    return 16 * head_dim


@triton.constexpr_function
def scale_bytes(code, head_dim):
    """Bytes of a page's key scales; by channel and by token alike, as a group has 64 elements."""
    if code % 32 > 16:
        return 64
    return 4 * head_dim if code <= 8 else 0


@triton.constexpr_function
def unit_of(field, code):
    """What one step of a field counts, where the field was read as it lies."""
    return 2.0 ** (24 - field * field_bits(code))


@triton.jit
def load_units(pool_half, start, token, channel, TOKEN: tl.constexpr, CHANNEL: tl.constexpr,
               D: tl.constexpr, CODE: tl.constexpr):  # fmt: skip
    """Units of half a page's tokens by some channels; of three bits their third bits beside them.

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
    return units


@triton.jit
def masked(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, CODE: tl.constexpr,
           NATIVE: tl.constexpr):  # fmt: skip
    """One field of one half page's bytes as fp16 whose bits it is: ``unit_of`` too small.

    Read as a number below the normal ones, a field in the lowest ten bits counts in steps of
    2^-24; tensor cores multiply such numbers exactly, so that a mask is all the unpacking. Third
    bits are moved up, and so lie above their field.
    """
    SHIFT: tl.constexpr = 8 * HALF_PAGE
    MASK: tl.constexpr = ((1 << field_bits(CODE)) - 1) << (FIELD * field_bits(CODE))
    ABOVE: tl.constexpr = 4 << (2 * FIELD)
    if bits_of(CODE) == 3:
        if NATIVE:
            field = tl.inline_asm_elementwise(
                _mask_with_third(HALF_PAGE, MASK, ABOVE), "=r,r,r", [units[0], units[1]],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            bits = (units[0].to(tl.uint16, bitcast=True) >> SHIFT) & MASK
            third = (units[1] << (2 - HALF_PAGE)) & ABOVE
            field = (bits | third).to(tl.uint16).to(tl.float16, bitcast=True)
    elif NATIVE:
        field = tl.inline_asm_elementwise(
            mask_of(HALF_PAGE, MASK), "=r,r", [units[0]], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        bits = units[0].to(tl.uint16, bitcast=True) >> SHIFT
        field = (bits & MASK).to(tl.float16, bitcast=True)
    return field


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


@triton.jit
def by_field(vector, W: tl.constexpr, FIELDS: tl.constexpr):
    """A key's channels [W] by field, out of one vector where they lie side by side."""
    if FIELDS == 1:
        parts = (vector,)
    elif FIELDS == 2:
        even, odd = tl.split(tl.reshape(vector, [W, 2]))
        parts = (even, odd)
    else:
        even, odd = tl.split(tl.reshape(vector, [W, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def by_half(vector):
    """Both halves [32] of a page, whose tokens t and t + 32 lie side by side."""
    first, last = tl.split(tl.reshape(vector, [HALF, 2]))
    return first, last


@triton.jit
def product(left, right, NATIVE: tl.constexpr):
    """Of bf16 tiles; Triton's interpreter multiplies them wrongly, and gets them wider."""
    if NATIVE:
        result = tl.dot(left, right)
    else:
        result = tl.dot(left.to(tl.float32), right.to(tl.float32))
    return result
