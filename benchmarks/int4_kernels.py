"""The two kernels of ``int4_linear``: one token times a packed matrix, and the matrix unpacked."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_BYTES = 128
"""Bytes of a row that a program takes at once: their low halves are a group, as are the high."""
_SHAPES = [
    triton.Config({"ROWS": rows, "GROUPS": groups}, num_warps=warps, num_stages=3)
    for rows, groups, warps in (
        (8, 1, 4), (4, 2, 4), (2, 4, 4), (4, 4, 4), (1, 4, 2), (1, 8, 4), (2, 8, 8), (8, 2, 8),
    )
]  # fmt: skip
"""Rows and groups that a program takes at once; the fastest for each matrix is found by trying."""


@triton.jit
def _number(code):
    """A code less 8: in a float's last bits, as an integer is slow to convert."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.autotune(_SHAPES, key=["HALF", "COUNT"])
@triton.jit
def product(
    x, packed, scales, out, HALF, COUNT, BYTES: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` of the ``COUNT`` numbers of a product with rows of ``HALF`` bytes.

    What each of them sums up stays apart by channel until the end.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    at = group * BYTES + tl.arange(0, BYTES)[None, None, :]
    total = tl.zeros([ROWS, GROUPS, BYTES], tl.float32)
    groups = HALF // BYTES  # of a row's low half; its high half has as many
    for start in tl.range(0, groups, GROUPS, num_stages=3):
        there = start + group < groups
        byte = tl.load(packed + row * HALF + start * BYTES + at, mask=there, other=0)
        known = scales + row * 2 * groups + start + group
        first = tl.load(known, mask=there, other=0.0).to(tl.float32)
        second = tl.load(known + groups, mask=there, other=0.0).to(tl.float32)
        x_low = tl.load(x + start * BYTES + at, mask=there, other=0.0).to(tl.float32)
        x_high = tl.load(x + HALF + start * BYTES + at, mask=there, other=0.0).to(tl.float32)
        total += _number(byte & 15) * x_low * first + _number(byte >> 4) * x_high * second
    summed = tl.sum(tl.sum(total, 2), 1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + rows, summed.to(out.dtype.element_ty), mask=rows < COUNT)


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
