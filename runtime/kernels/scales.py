"""Scales of blocks, whichever way they lie: what multiplies a group of a token's numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import HALF, PAGE, by_half, groups_of, scales_of


@triton.jit
def load_scales(pool_half, start, D: tl.constexpr, CODE: tl.constexpr):
    """A page's scales by group, then half page, each [32] float32; and the codes that stand for
    zero, where scales say them.

    Args:
        pool_half, start: the pool's memory, and the first byte of all scales.
    """
    GROUPS: tl.constexpr = groups_of(CODE, D)
    scales, zeros = (), ()
    if scales_of(CODE) == "power" or scales_of(CODE) == "e4m3":
        every = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + start
        for two in tl.static_range(GROUPS // 2):  # a byte a thread could not be copied ahead
            both = tl.load(every + two * (2 * PAGE) + tl.arange(0, 2 * PAGE))
            first, last = tl.split(tl.permute(tl.reshape(both, [2, HALF, 2]), 1, 2, 0))
            scales = scales + tl.split(_from_byte(first, CODE)) + tl.split(_from_byte(last, CODE))
    elif scales_of(CODE) != "none":
        for group in tl.static_range(GROUPS):
            token = group * PAGE + tl.arange(0, PAGE)
            if scales_of(CODE) == "single" or scales_of(CODE) == "single_zero":
                every = pool_half.to(tl.pointer_type(tl.int32), bitcast=True) + start // 4
                words = tl.load(every + token)
                if scales_of(CODE) == "single_zero":
                    zeros = zeros + by_half((words & 15).to(tl.float32))
                    words = words & -16
                scales = scales + by_half(words.to(tl.float32, bitcast=True))
            else:
                every = pool_half + start // 2
                scales = scales + by_half(tl.load(every + token).to(tl.float32))
                if scales_of(CODE) == "half_zero":
                    zero = tl.load(every + GROUPS * PAGE + token)
                    zeros = zeros + by_half(zero.to(tl.float32))
    return scales, zeros


@triton.jit
def _from_byte(byte, CODE: tl.constexpr):
    """What scales of a byte stand for: the exponent of a power of two, or a float of eight bits."""
    bits = byte.to(tl.int32)
    if scales_of(CODE) == "power":
        scale = (bits << 23).to(tl.float32, bitcast=True)
    else:
        scale = (bits << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return scale
