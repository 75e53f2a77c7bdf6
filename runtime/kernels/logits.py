"""What a step's keys say to a group's queries: the first half of decode attention."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    BF16,
    BF16_PAGE,
    HALF,
    PAGE,
    by_field,
    by_half,
    code_bytes,
    fields_of,
    first_channel,
    fixed_zero,
    group_of,
    groups_of,
    has_zeros,
    is_by_token,
    is_float,
    is_signs,
    key_parts,
    parts_of,
    product,
    scales_of,
)
from kvtune.runtime.kernels.scales import load_scales
from kvtune.runtime.kernels.signs import sign_logits
from kvtune.runtime.kernels.turning import turned_queries
from kvtune.runtime.kernels.unpacking import (
    field_share,
    load_units,
    unit_of,
    unpacked,
)


@triton.jit
def load_queries(q, factor, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                 KEYS: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """The group's queries [D / parts, M] by part, in the type that keys are multiplied in.

    For keys by token each is divided by what its field is too large, and beside them stand their
    sums by group [M], times ``factor``: what an offset adds to a logit. Others have no sums.
    Where keys are TURNED, so are the queries.
    """
    PARTS: tl.constexpr = key_parts(KEYS, D)
    W: tl.constexpr = D // PARTS
    head, channel = tl.arange(0, M), tl.arange(0, W)
    queries, sums = (), ()
    if TURNED:
        turned = turned_queries(q, D, G, M, KEYS, PARTS)
    for part in tl.static_range(PARTS):
        first = first_channel(part, KEYS, D)
        if TURNED:
            query = turned[part]
        else:
            place = head[None, :] * D + first + channel[:, None]
            query = tl.load(q + place, mask=head[None, :] < G, other=0)
        query = query.to(tl.bfloat16 if KEYS == BF16 else tl.float16)
        if is_by_token(KEYS):
            sums = sums + (tl.sum(query.to(tl.float32), 0) * factor,)
            query = query * tl.full([1, 1], field_share(part % fields_of(KEYS), KEYS), tl.float16)
        queries = queries + (query,)
    grouped = ()
    if is_by_token(KEYS):
        for group in tl.static_range(groups_of(KEYS, D)):
            total = tl.zeros([M], tl.float32)
            for part in tl.static_range(PARTS):
                if group_of(part, KEYS, D) == group:
                    total += sums[part]
            grouped = grouped + (total,)
    return queries, grouped


@triton.jit
def logits_of(queries, sums, pool_half, pool_bf16, pool_fp8, start, gap, begin, factor,
              D: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
              PAIRED: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Logits of a step by half pages, each [32, M].

    Args:
        queries, sums: of ``load_queries``.
        pool_*: the pool's memory.
        start: the page's first byte.
        gap: where PAIRED, elements that a token of the second page lies beyond its place in one
            long page. (Sums are seen to be aligned, and copied in the background; choices are not.)
        begin: the first token that is looked at.
        factor: logits are multiplied by it.
    """
    if is_signs(KEYS):
        logits = sign_logits(queries, sums, pool_half, start, D, M, KEYS, NATIVE)
    elif is_float(KEYS):
        logits = _float_logits(queries, pool_bf16, pool_fp8, start, gap, begin, factor,
                               D, KEYS, HALVES, PAIRED, NATIVE)  # fmt: skip
    elif is_by_token(KEYS):
        logits = _token_logits(queries, sums, pool_half, start, factor, D, M, KEYS, NATIVE)
    else:
        logits = _channel_logits(queries, pool_half, start, factor, D, M, KEYS, HALVES, NATIVE)
    return logits


@triton.jit
def _float_logits(queries, pool_bf16, pool_fp8, start, gap, begin, factor, D: tl.constexpr,
                  KEYS: tl.constexpr, HALVES: tl.constexpr, PAIRED: tl.constexpr,
                  NATIVE: tl.constexpr):  # fmt: skip
    channel, token = tl.arange(0, D), tl.arange(0, HALF)
    place = token[:, None] * D + channel[None, :]
    logits = ()
    for half in tl.static_range(HALVES):
        first = (begin + half * HALF) * D
        if KEYS == BF16:
            page = start // 2
            if PAIRED:
                page += (token // BF16_PAGE)[:, None] * gap
            keys = tl.load(pool_bf16 + page + first + place)
            logits = logits + (product(keys, queries[0], NATIVE) * factor,)
        else:
            keys = tl.load(pool_fp8 + start + first + place).to(tl.float16)
            logits = logits + (tl.dot(keys, queries[0]) * factor,)
    return logits


@triton.jit
def _channel_logits(queries, pool_half, start, factor, D: tl.constexpr, M: tl.constexpr,
                    KEYS: tl.constexpr, HALVES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Scales go to the queries; offsets become one logit a page."""
    FIELDS: tl.constexpr = fields_of(KEYS)
    W: tl.constexpr = D // FIELDS
    channel, token = tl.arange(0, W), tl.arange(0, HALF)
    codes = load_units(pool_half, start, token[:, None], channel[None, :], W, 1, D, KEYS,
                       NATIVE)  # fmt: skip
    every = pool_half + (start + code_bytes(KEYS, D)) // 2 + tl.arange(0, D)
    scales = by_field(tl.load(every), W, FIELDS)
    offsets = by_field(tl.load(every + D), W, FIELDS)
    bias = tl.zeros([16, M], tl.float32)
    scaled = ()
    for field in tl.static_range(FIELDS):
        bias = tl.dot(tl.broadcast_to(offsets[field][None, :], [16, W]), queries[field], bias)
        scale = scales[field] * tl.full([1], field_share(field, KEYS), tl.float16)
        scaled = scaled + (queries[field] * scale[:, None],)
    shift = tl.max(bias, 0) * factor
    logits = ()
    for half in tl.static_range(HALVES):
        sums = tl.zeros([HALF, M], tl.float32)
        for field in tl.static_range(FIELDS):
            sums = tl.dot(unpacked(codes, half, field, KEYS, NATIVE), scaled[field], sums)
        logits = logits + (sums * (factor * 16777216.0) + shift[None, :],)
    return logits


@triton.jit
def _token_logits(queries, sums, pool_half, start, factor, D: tl.constexpr, M: tl.constexpr,
                  KEYS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Products by group of channels, each times its tokens' scales; a page at once."""
    FIELDS: tl.constexpr = fields_of(KEYS)
    PARTS: tl.constexpr = parts_of(KEYS, D)
    GROUPS: tl.constexpr = groups_of(KEYS, D)
    W: tl.constexpr = D // PARTS
    channel, token = tl.arange(0, W), tl.arange(0, HALF)
    codes = ()
    for chunk in tl.static_range(PARTS // FIELDS):
        mine = chunk * W + channel[None, :]
        units = load_units(pool_half, start, token[:, None], mine, D // FIELDS, 1, D, KEYS,
                           NATIVE)  # fmt: skip
        codes = codes + (units,)
    scales, zeros = _token_scales(pool_half, start + code_bytes(KEYS, D), D, KEYS)
    logits = ()
    for half in tl.static_range(2):
        logit = tl.zeros([HALF, M], tl.float32)
        for group in tl.static_range(GROUPS):
            products = tl.zeros([HALF, M], tl.float32)
            for part in tl.static_range(PARTS):
                if group_of(part, KEYS, D) == group:
                    field = unpacked(codes[part // FIELDS], half, part % FIELDS, KEYS, NATIVE)
                    products = tl.dot(field, queries[part], products)
            if scales_of(KEYS) == "offset":
                scale = scales[2 * group + half].to(tl.float32) * (factor * unit_of(0, KEYS))
                offset = zeros[2 * group + half].to(tl.float32)
                shift = offset[:, None] * sums[group][None, :]
                before = shift if group == 0 else logit + shift
                logit = before + products * scale[:, None]
            else:
                level = products * (factor * unit_of(0, KEYS))
                if has_zeros(KEYS):
                    level -= zeros[2 * group + half][:, None] * sums[group][None, :]
                elif fixed_zero(KEYS) > 0:
                    level -= (sums[group] * fixed_zero(KEYS))[None, :]
                if scales_of(KEYS) == "none":
                    logit += level
                else:
                    logit += level * scales[2 * group + half][:, None]
        logits = logits + (logit,)
    return logits


@triton.jit
def _token_scales(pool_half, start, D: tl.constexpr, KEYS: tl.constexpr):
    """Scales by group and half page, and beside them offsets or the codes that stand for zero."""
    GROUPS: tl.constexpr = groups_of(KEYS, D)
    scales, zeros = (), ()
    if scales_of(KEYS) == "offset":
        every = pool_half + start // 2 + tl.arange(0, PAGE)
        for group in tl.static_range(GROUPS):
            scales = scales + by_half(tl.load(every + group * PAGE))
            zeros = zeros + by_half(tl.load(every + (GROUPS + group) * PAGE))
    else:
        scales, zeros = load_scales(pool_half, start, D, KEYS)
    return scales, zeros
