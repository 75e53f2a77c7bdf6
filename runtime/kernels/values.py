"""What a step's values add to a group's outputs: the second half of decode attention."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    BF16,
    BF16_PAGE,
    HALF,
    PAGE,
    by_half,
    code_bytes,
    fields_of,
    first_channel,
    fixed_zero,
    group_of,
    groups_of,
    has_zeros,
    is_float,
    is_signs,
    parts_of,
    product,
    scales_of,
)
from kvtune.runtime.kernels.scales import load_scales
from kvtune.runtime.kernels.signs import add_sign_values
from kvtune.runtime.kernels.turning import store_turned
from kvtune.runtime.kernels.unpacking import load_units, unit_of, unpacked


@triton.constexpr_function
def sums_of(values, head_dim):
    """Accumulators of a tile: one a part, or a run's bit of signs."""
    if is_signs(values):
        return 8 * (((values - 5) * head_dim // 64 + 15) // 16)
    return parts_of(values, head_dim)


@triton.jit
def add_values(acc, shifts, shrink, weights, pool_half, pool_bf16, pool_fp8, start, gap, begin,
               D: tl.constexpr, VALUES: tl.constexpr, HALVES: tl.constexpr, PAIRED: tl.constexpr,
               NATIVE: tl.constexpr):  # fmt: skip
    """The accumulators, one a part, and what offsets add to a group's, after another step."""
    if is_signs(VALUES):
        added, moved = add_sign_values(acc, shifts, shrink, weights, pool_half, start,
                                       D, VALUES, NATIVE)  # fmt: skip
    elif is_float(VALUES):
        sums = _add_floats(acc[0] * shrink[None, :], weights, pool_bf16, pool_fp8, start, gap,
                           begin, D, VALUES, HALVES, PAIRED, NATIVE)  # fmt: skip
        added, moved = (sums,), shifts
    else:
        scaled, moved = _scaled_weights(shifts, shrink, weights, pool_half,
                                        start + code_bytes(VALUES, D), D, VALUES)  # fmt: skip
        added = _add_codes(acc, shrink, scaled, pool_half, start, D, VALUES, NATIVE)
    return added, moved


@triton.jit
def _add_floats(sums, weights, pool_bf16, pool_fp8, start, gap, begin,
                D: tl.constexpr, VALUES: tl.constexpr, HALVES: tl.constexpr, PAIRED: tl.constexpr,
                NATIVE: tl.constexpr):  # fmt: skip
    """Sums [D, M] of values of 16 bits, or of fp8."""
    channel, token = tl.arange(0, D), tl.arange(0, HALF)
    for half in tl.static_range(HALVES):
        first = begin + half * HALF
        if VALUES == BF16:
            place = (first + token)[None, :] * D + channel[:, None]
            page = start // 2
            if PAIRED:
                page += (token // BF16_PAGE)[None, :] * gap
            values = tl.load(pool_bf16 + page + place)
            sums += product(values, weights[half].to(tl.bfloat16), NATIVE)
        else:
            place = channel[:, None] * PAGE + (first + token)[None, :]
            values = tl.load(pool_fp8 + start + place).to(tl.float16)
            sums = tl.dot(values, weights[half].to(tl.float16), sums)
    return sums


@triton.jit
def _scaled_weights(shifts, shrink, weights, pool_half, start,
                    D: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Weights times scales by group, then half; and by group what all codes' zero adds so far."""
    GROUPS: tl.constexpr = groups_of(VALUES, D)
    every = pool_half + start // 2 + tl.arange(0, PAGE)
    scaled, moved = (), ()
    if scales_of(VALUES) != "offset":
        scales, zeros = load_scales(pool_half, start, D, VALUES)
    for group in tl.static_range(GROUPS):
        shift = shifts[group] * shrink[None, :]
        if scales_of(VALUES) == "offset":
            scale = by_half(tl.load(every + group * PAGE))
            offset = by_half(tl.load(every + (GROUPS + group) * PAGE))
            for half in tl.static_range(2):
                shift += weights[half] * offset[half].to(tl.float32)[:, None]
                scaled = scaled + (weights[half].to(tl.float16) * scale[half][:, None],)
        elif scales_of(VALUES) == "none":
            for half in tl.static_range(2):
                scaled = scaled + (weights[half].to(tl.float16),)
        else:
            for half in tl.static_range(2):
                weight = (weights[half] * scales[2 * group + half][:, None]).to(tl.float16)
                if has_zeros(VALUES):
                    shift -= weight.to(tl.float32) * zeros[2 * group + half][:, None]
                elif fixed_zero(VALUES) > 0:
                    shift -= weight.to(tl.float32) * fixed_zero(VALUES)
                scaled = scaled + (weight,)
        moved = moved + (shift,)
    return scaled, moved


@triton.jit
def _add_codes(acc, shrink, scaled, pool_half, start,
               D: tl.constexpr, VALUES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Sums [W, M] by part, as small as ``unpacked`` leaves codes."""
    FIELDS: tl.constexpr = fields_of(VALUES)
    W: tl.constexpr = D // parts_of(VALUES, D)
    channel, token = tl.arange(0, W), tl.arange(0, HALF)
    added = ()
    for chunk in tl.static_range(parts_of(VALUES, D) // FIELDS):
        codes = load_units(pool_half, start, token[None, :], (chunk * W + channel)[:, None],
                           1, HALF, D, VALUES, NATIVE)  # fmt: skip
        for field in tl.static_range(FIELDS):
            sums = acc[chunk * FIELDS + field] * shrink[None, :]
            for half in tl.static_range(2):
                values = unpacked(codes, half, field, VALUES, NATIVE)
                weight = scaled[2 * group_of(chunk * FIELDS + field, VALUES, D) + half]
                sums = tl.dot(values, weight, sums)
            added = added + (sums,)
    return added


@triton.jit
def store_parts(scratch, acc, shifts, total, value_scale, D: tl.constexpr, G: tl.constexpr,
                 M: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
                 TURNED: tl.constexpr):  # fmt: skip
    """The output by channel, out of a step's accumulators."""
    W: tl.constexpr = D // PARTS
    head = tl.arange(0, M)
    share = value_scale / tl.maximum(total, 1e-30)
    FIELDS: tl.constexpr = fields_of(VALUES)
    outputs = ()
    for part in tl.static_range(PARTS):
        output = acc[part]
        if not is_float(VALUES):
            shift = tl.sum(shifts[group_of(part, VALUES, D)], 0)
            output = output * unit_of(part % FIELDS, VALUES) + shift[None, :]
        outputs = outputs + (output * share[None, :],)
    if TURNED:
        store_turned(scratch, outputs, D, G, M, VALUES, PARTS)
    else:
        channel = tl.arange(0, W)
        for part in tl.static_range(PARTS):
            place = head[None, :] * D + first_channel(part, VALUES, D) + channel[:, None]
            tl.store(scratch + place, outputs[part], mask=head[None, :] < G)
