"""What pages call formats, and what kernels call them: their numbers, bits and bytes."""

from __future__ import annotations

from functools import cache

from kvtune.policies.blocks import FIRST_NUMBER, SCALES, Blocks
from kvtune.policies.formats.blocked import BlockFormat, block_forms, name_of

PAGE = 64
"""Tokens of a page whose keys or values are coded; also the group that shares a scale."""

BF16_PAGE = 16
"""Tokens of a page whose keys and values are both in 16 bits; half of a kernel's step, or all."""

CODES = {"bf16": 16, "fp8": 9, "int8": 8, "int3": 6, "int4": 4, "int2": 2}
"""What a kernel calls a format: its bits, 9 for fp8, and 6 for three bits."""

BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits an element, scales aside."""

AS_VALUES = "-token"
"""How the names of keys end that are grouped as values are, by token."""

_INTEGERS = {name: code for name, code in CODES.items() if name.startswith("int")}

KEY_CODES = CODES | {name + AS_VALUES: code - 1 for name, code in _INTEGERS.items()}
"""Of keys: also integers by token, which are called one less than others."""

ROTATED = "rotated_"
"""How the names of formats begin whose numbers lie in a page times a Hadamard matrix."""

TURNED = 32
"""What is added to a format's number where it is rotated."""

PAIR = 8192
"""What the number of a pair's keys counts, beside the values' own."""

SIGNS = {f"signs{eighths / 8:g}": eighths + 5 for eighths in range(12, 27)}
"""Rows of signs, by their mean bits: 17 of one and a half, 31 of three and a quarter."""

VALUE_CODES = CODES | {ROTATED + name: code + TURNED for name, code in _INTEGERS.items()}
"""Numbers by which kernels know the formats of values."""

ALL_KEY_CODES = KEY_CODES | {
    ROTATED + name: code + TURNED for name, code in KEY_CODES.items() if code <= 8
}
"""Numbers by which kernels know the formats of keys."""

_SIGN_CODES = SIGNS | {ROTATED + name: code + TURNED for name, code in SIGNS.items()}
_PLAIN_CODES = ALL_KEY_CODES | VALUE_CODES | _SIGN_CODES
_PLAIN_NAMES = {number: name for name, number in _PLAIN_CODES.items()}

CLIP = {2: 0.7, 3: 0.85, 4: 1.0, 8: 1.0}
"""What is left of the range of a rotated group, by its bits: the formats' own defaults."""


def number_of(name: str) -> int:
    """What kernels call a format."""
    return _PLAIN_CODES[name] if name in _PLAIN_CODES else block_form(name).blocks.number


def named(number: int) -> str:
    """A format that kernels call so."""
    return _PLAIN_NAMES[number] if number < FIRST_NUMBER else name_of(number)


def is_blocks(name: str) -> bool:
    """Whether tokens lie by a description of their blocks."""
    return name not in _PLAIN_CODES


def block_form(name: str) -> BlockFormat:
    """The format in blocks that pages call so."""
    return block_forms()[name]


def blocks_of(name: str) -> Blocks:
    """How its blocks lie."""
    return block_form(name).blocks


@cache
def has_head_scales(name: str) -> bool:
    """Whether all of a head's tokens share a scale, which lies beside its lengths."""
    return name == "fp8" or (is_blocks(name) and blocks_of(name).scales == "e4m3")


def is_signs(name: str) -> bool:
    """Whether a page holds rows of signs."""
    return name.removeprefix(ROTATED) in SIGNS


def is_integer(name: str) -> bool:
    """Whether a format has codes with scales."""
    return not is_blocks(name) and name.removeprefix(ROTATED).startswith("int")


def is_rotated(name: str) -> bool:
    """Whether a page holds this format's numbers times a Hadamard matrix; blocks say it."""
    return name.startswith(ROTATED)


def is_by_token(name: str) -> bool:
    """Whether these are keys that are grouped as values are."""
    return name.endswith(AS_VALUES)


def sign_bytes(name: str, head_dim: int) -> int:
    """Bytes of a token's signs."""
    return (SIGNS[name.removeprefix(ROTATED)] - 5) * head_dim // 64


def bits(name: str) -> int:
    """Bits an element, scales aside."""
    if is_blocks(name):
        return blocks_of(name).bits
    return BITS[name.removeprefix(ROTATED).removesuffix(AS_VALUES)]


def field_bits(bits: int) -> int:
    """Bits of a code in a field of a byte: the third of three lies in a plane apart."""
    return 2 if bits == 3 else bits


def fields(name: str) -> int:
    """Channels that share a byte, or what of one holds the lower two of their three bits."""
    return 8 // field_bits(bits(name))


def code_bytes(name: str, head_dim: int, tokens: int = PAGE) -> int:
    """Bytes of the codes of a page of so many tokens, of keys or of values."""
    if is_signs(name):
        return tokens * sign_bytes(name, head_dim)
    return tokens * head_dim * bits(name) // 8


def scale_bytes(name: str, head_dim: int, by_token: bool) -> int:
    """Bytes of a page's scales and offsets, of keys or of values."""
    if is_signs(name):
        return PAGE
    if is_blocks(name):
        return PAGE * blocks_of(name).count(head_dim) * SCALES[blocks_of(name).scales]
    if not is_integer(name):
        return 0
    return 4 * (PAGE * token_groups(head_dim) if by_token else head_dim)


def token_groups(head_dim: int) -> int:
    """Groups of a token's channels that share a scale."""
    return -(-head_dim // PAGE)
