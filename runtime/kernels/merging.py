"""One head's output from the parts that its tiles left in scratch."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge(scratch, scratch_lse, count, out, row_lse,
          D: tl.constexpr, G: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """One head's output from its slots; read past L1, which knows nothing of other programs."""
    BLOCK: tl.constexpr = 8
    HEADS: tl.constexpr = M if G > 8 else (8 if G > 4 else (4 if G > 2 else G))
    head, channel, slot = tl.arange(0, HEADS), tl.arange(0, D), tl.arange(0, BLOCK)
    lse_at = slot[:, None] * G + head[None, :]
    largest = tl.full([HEADS], -float("inf"), tl.float32)
    for start in tl.range(0, count, BLOCK):
        real = (start + slot < count)[:, None] & (head < G)[None, :]
        lse = tl.load(scratch_lse + start * G + lse_at, mask=real, other=-float("inf"),
                      cache_modifier=".cg")  # fmt: skip
        largest = tl.maximum(largest, tl.max(lse, 0))
    largest = tl.maximum(largest, -1e30)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, D], tl.float32)
    for start in tl.range(0, count, BLOCK):
        real = (start + slot < count)[:, None] & (head < G)[None, :]
        lse = tl.load(scratch_lse + start * G + lse_at, mask=real, other=-float("inf"),
                      cache_modifier=".cg")  # fmt: skip
        weight = tl.exp2((lse - largest[None, :]) * LOG2_E)
        part = tl.load(scratch + start * G * D + lse_at[:, :, None] * D + channel[None, None, :],
                       mask=real[:, :, None], other=0, cache_modifier=".cg")  # fmt: skip
        total += tl.sum(weight, 0)
        output += tl.sum(part * weight[:, :, None], 0)
    output = output / tl.maximum(total, 1e-30)[:, None]
    place = head[:, None] * D + channel[None, :]
    tl.store(out + place, output.to(out.dtype.element_ty), mask=head[:, None] < G)
    tl.store(row_lse + head, largest + tl.log2(total) / LOG2_E, mask=head < G)
