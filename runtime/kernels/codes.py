"""What kernels know of a format by its number (``policies.page_formats``): sizes and places.

A *part* of a key or value is a run of its channels that share a field of their bytes and a group:
what is multiplied at once. Parts go by chunk, then field. Numbers from 64 on are descriptions of
blocks (``policies.blocks.Blocks.number``), whose fields are read here; integers by token lie as
blocks of 64 channels do.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
BF16_PAGE = tl.constexpr(16)
HALF = tl.constexpr(32)
BF16 = tl.constexpr(16)
FP8 = tl.constexpr(9)
PAIR = tl.constexpr(8192)


@triton.constexpr_function
def keys_of(pair):
    """The number of a pair's keys."""
    return pair // 8192


@triton.constexpr_function
def values_of(pair):
    """The number of a pair's values."""
    return pair % 8192


@triton.constexpr_function
def is_blocks(code):
    """Whether a number is a description of blocks."""
    return code >= 64


@triton.constexpr_function
def bits_of(code):
    """Bits of a code; keys by token are called one less than values, and three bits six."""
    if code >= 64:
        return code % 8 + 1
    even = code + code % 2
    return 8 if code == 9 else 3 if even == 6 else even


@triton.constexpr_function
def table_of(code):
    """What codes stand for."""
    return ("integers", "e2m1", "e4m3", "normal")[code // 8 % 4] if code >= 64 else "integers"


@triton.constexpr_function
def scales_of(code):
    """How a group's scale lies; beside that of integers lies an offset."""
    if code < 64:
        return "offset"
    kinds = ("none", "half", "half_zero", "single", "single_zero", "power", "e4m3")
    return kinds[code // 512 % 8]


@triton.constexpr_function
def fixed_zero(code):
    """The code that stands for zero, where no scale says it."""
    fixed = table_of(code) == "integers" and scales_of(code) in ("none", "half", "single")
    return 2 ** (bits_of(code) - 1) if fixed else 0


@triton.constexpr_function
def has_zeros(code):
    """Whether a scale says which code stands for zero."""
    return scales_of(code) in ("half_zero", "single_zero")


@triton.constexpr_function
def has_head_scale(code):
    """Whether a head's fp8 scale multiplies the blocks' scales."""
    return scales_of(code) == "e4m3"


@triton.constexpr_function
def whole_scale(code, head_dim):
    """What multiplies all numbers besides: of fp8's scale, or because a rotation has no norm."""
    if has_random_signs(code):
        return head_dim**-0.5
    return 1 / 6 if has_head_scale(code) else 1.0


@triton.constexpr_function
def field_bits(code):
    """Bits of an element in a field of a byte: the third of three lies in a plane apart."""
    return 2 if bits_of(code) == 3 else bits_of(code)


@triton.constexpr_function
def is_float(code):
    """Whether these are numbers of 16 bits, or fp8 with a scale a head."""
    return code in (9, 16)


@triton.constexpr_function
def is_by_token(code):
    """Whether these are keys with a scale a token, as values have."""
    return code >= 64 or (code < 8 and code % 2 == 1)


@triton.constexpr_function
def plain_code(code):
    """The number of a format without its rotation."""
    return code - code // 32 % 2 * 32


@triton.constexpr_function
def is_turned(code):
    """Whether a format is rotated."""
    return code // 32 % 2 == 1


@triton.constexpr_function
def has_random_signs(code):
    """Whether channels have signs of their own before they are rotated, without the norm."""
    return code >= 4096


@triton.constexpr_function
def is_signs(code):
    """Whether a page holds rows of signs."""
    return code < 64 and code % 32 > 16


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
def group_width(code, head_dim):
    """Channels of a token that share a scale."""
    if code < 64:
        return 64
    return (0, 16, 32, 64)[code // 128 % 4] or head_dim


@triton.constexpr_function
def parts_of(code, head_dim):
    """Runs of channels with neither two fields nor two groups of a token; one of a float's."""
    return 1 if is_float(code) else max(fields_of(code), head_dim // group_width(code, head_dim))


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
    """Groups of a token's channels that share a scale; one, of nothing, for floats."""
    if is_float(code) or is_signs(code):
        return 1
    width = group_width(code, head_dim)
    return (head_dim + width - 1) // width


@triton.constexpr_function
def group_of(part, code, head_dim):
    """Of the channels of a part."""
    return first_channel(part, code, head_dim) // group_width(code, head_dim)


@triton.constexpr_function
def page_tokens(keys, values):
    """Tokens of a page of these formats."""
    return 16 if keys == values == 16 else 64


@triton.constexpr_function
def code_bytes(code, head_dim, tokens=64):
    """Bytes of the codes of a page of so many tokens."""
    if is_signs(code):
        return tokens * (code % 32 - 5) * head_dim // 64
    return tokens * head_dim * bits_of(code) // 8


@triton.constexpr_function
def plane_at(head_dim):
    """Where the plane of third bits begins among a page's codes, in bytes."""
    return 16 * head_dim


@triton.constexpr_function
def scale_bytes(code, head_dim):
    """Bytes of a page's key scales; of integers by channel and by token alike, as a group has 64
    elements."""
    if is_signs(code):
        return 64
    if code >= 64:
        each = {"none": 0, "half": 2, "power": 1, "e4m3": 1}.get(scales_of(code), 4)
        return 64 * groups_of(code, head_dim) * each
    return 4 * head_dim if code <= 8 else 0


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
