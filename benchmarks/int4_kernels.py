"""The two kernels of ``int4_linear``: one token times a packed matrix, and the matrix unpacked."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_BYTES = 128
"""Bytes of a row that a program takes at once: their low halves are a group, as are the high."""
ROWS = 8


@triton.jit
def _number(code):
    """A code less 8: in a float's last bits, as an integer is slow to convert."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def product(x, packed, scales, out, HALF, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """``ROWS`` numbers of the product; ``HALF`` bytes a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BYTES)
    total = tl.zeros([ROWS, BYTES], tl.float32)
    groups = 2 * HALF // BYTES
    for start in tl.range(0, HALF, BYTES, num_stages=4):
        byte = tl.load(packed + row[:, None] * HALF + start + at[None, :])
        low, high = _number(byte & 15), _number(byte >> 4)
        group = row * groups + start // BYTES
        first = tl.load(scales + group).to(tl.float32)[:, None]
        second = tl.load(scales + group + groups // 2).to(tl.float32)[:, None]
        x_low = tl.load(x + start + at).to(tl.float32)[None, :]
        x_high = tl.load(x + HALF + start + at).to(tl.float32)[None, :]
        total += low * first * x_low + high * second * x_high
    tl.store(out + row, tl.sum(total, 1).to(out.dtype.element_ty))


@triton.jit
def unpack(packed, scales, out, HALF, BYTES: tl.constexpr):
    """One group of low and one of high weights of one row, as floats."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BYTES + tl.arange(0, BYTES)
    byte = tl.load(packed + row * HALF + at)
    groups = 2 * HALF // BYTES
    low = (byte & 15).to(tl.float32) - 8
    high = (byte >> 4).to(tl.float32) - 8
    first = tl.load(scales + row * groups + block).to(tl.float32)
    second = tl.load(scales + row * groups + groups // 2 + block).to(tl.float32)
    tl.store(out + row * 2 * HALF + at, (low * first).to(out.dtype.element_ty))
    tl.store(out + row * 2 * HALF + HALF + at, (high * second).to(out.dtype.element_ty))
