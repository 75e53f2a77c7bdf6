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
    """Bits an element; keys by token are called one less than their bits."""
    return 8 if code == 9 else code + code % 2


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
def drawn_in(code, turned):
    """What either end of a group's range loses; see ``layout.CLIP``."""
    return (1 - 0.7) / 2 if turned and bits_of(code) == 2 else 0.0


@triton.constexpr_function
def fields_of(code):
    """Channels that share a byte."""
    return max(8 // bits_of(code), 1)


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
    """Of a part."""
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
    return tokens * head_dim * bits_of(code) // 8


@triton.constexpr_function
def scale_bytes(code, head_dim):
    """Bytes of a page's key scales; by channel and by token alike, as a group has 64 elements."""
    return 4 * head_dim if code <= 8 else 0


@triton.constexpr_function
def unit_of(field, bits):
    """What one step of a field counts, where the field was read as it lies."""
    return 2.0 ** (24 - field * bits)


@triton.jit
def masked(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr,
           NATIVE: tl.constexpr):  # fmt: skip
    """One field of one half page's bytes as fp16 whose bits it is: 2^(24 - FIELD * BITS) too small.

    Read as a number below the normal ones, a field in the lowest ten bits counts in steps of
    2^-24; tensor cores multiply such numbers exactly, so that a mask is all the unpacking.
    """
    if NATIVE:
        field = tl.inline_asm_elementwise(
            _mask(HALF_PAGE, FIELD, BITS), "=r,r", [units], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        bits = units.to(tl.uint16, bitcast=True) >> (8 * HALF_PAGE)
        field = (bits & (((1 << BITS) - 1) << (FIELD * BITS))).to(tl.float16, bitcast=True)
    return field


@triton.constexpr_function
def _mask(half, field, bits):
    """PTX that masks one field of two units."""
    mask = (((1 << bits) - 1) << (field * bits)) * 0x10001
    if half == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 high; shr.b32 high, $1, 8; and.b32 $0, high, {mask}; }}"


@triton.jit
def signs(row, column):
    """Signs [R, C] fp16 of a Hadamard matrix, of 32 columns or rows at most.

    Of more, each 32 are these times ``sign_of``: the matrix is a Kronecker product.
    """
    return negative_where_odd(row[:, None] & column[None, :] & 31)


@triton.jit
def sign_of(channel, START: tl.constexpr):
    """What the signs of ``channel`` and of 32 others from START on are times those from 0 on."""
    return negative_where_odd(channel & START)


@triton.jit
def negative_where_odd(shared):
    """1, or -1 where of the lowest eight bits an odd number is set, fp16: as its bits lie."""
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return (0x3C00 | ((shared & 1) << 15)).to(tl.uint16).to(tl.float16, bitcast=True)


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
