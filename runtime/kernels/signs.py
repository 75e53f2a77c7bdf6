"""Decode attention over tokens that are rows of signs, as ``policies.formats.fitted`` makes them.

A channel of b bits is b signs, of which sign p counts 2^p halves of the channel's step: a query is
spread over the signs of its channels once, keys are then one product of signs whatever bits their
channels have, and values are gathered by sign and brought back to channels once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.turning import negative_where_odd

CHUNK = tl.constexpr(32)  # signs that are multiplied at once
STEP = tl.constexpr(64)  # tokens
LOG2_E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(6.0)  # weights are 2^6 times too large, which keeps small ones normal in fp16


@triton.jit
def attend_signs(
    q, rows, starts, balance,
    key_codes, key_tokens, key_steps, key_means, key_widths,
    value_codes, value_tokens, value_steps, value_means, value_widths,
    out, lse, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    BALANCED: tl.constexpr, KEYS_TURNED: tl.constexpr, VALUES_TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT tokens of one part with the query heads of its group.

    Args:
        q: [rows of the layer, G, D].
        rows: [parts] int64, whose each is.
        starts: [parts + 1] int32, the first token of each among those of all.
        balance: [parts, D], keys are read divided by it, where BALANCED.
        key_codes: [tokens, KEY_BYTES] uint8, a sign a bit, the lowest first; so of values.
        key_tokens: [tokens] uint8, logarithms of the tokens' scales; so of values.
        key_steps, key_means: [parts, D] fp16, of directions; so of values.
        key_widths: [parts, D] uint8, signs of each direction; so of values.
        out: [parts, splits, G, D] float32.
        lse: [parts, splits, G] float32, natural.
        KEYS_TURNED, VALUES_TURNED: whether directions are channels times a Hadamard matrix.
    """
    part, split = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts + part) + split * SPLIT
    tokens = tl.minimum(tl.load(starts + part + 1) - begin, SPLIT)
    channel, head, token = tl.arange(0, D), tl.arange(0, M), tl.arange(0, STEP)
    place = head[None, :] * D + channel[:, None]
    query = tl.load(q + tl.load(rows + part) * (G * D) + place, mask=head[None, :] < G, other=0)
    query = query.to(tl.float32) * (softmax_scale * LOG2_E)
    if BALANCED:
        query /= tl.load(balance + part * D + channel).to(tl.float32)[:, None]
    if KEYS_TURNED:
        query = _turned(query, D)
    bias = tl.sum(query * tl.load(key_means + part * D + channel).to(tl.float32)[:, None], 0)
    query *= tl.load(key_steps + part * D + channel).to(tl.float32)[:, None]
    widths = tl.load(key_widths + part * D + channel).to(tl.int32)
    first = tl.cumsum(widths, 0) - widths
    queries = ()
    for chunk in tl.static_range((8 * KEY_BYTES + 31) // 32):
        spread = tl.dot(_shares(first, widths, chunk), query.to(tl.float16))
        queries = queries + (spread.to(tl.float16),)
    sums = ()
    for _ in tl.static_range((8 * VALUE_BYTES + 31) // 32):
        sums = sums + (tl.zeros([CHUNK, M], tl.float32),)
    total = tl.zeros([M], tl.float32)
    largest = tl.full([M], -1e30, tl.float32)
    for at in tl.range(0, tokens, STEP):
        real = at + token < tokens
        mine = (begin + at + token).to(tl.int64)
        logits = tl.zeros([STEP, M], tl.float32)
        for chunk in tl.static_range((8 * KEY_BYTES + 31) // 32):
            signs = _signs(key_codes + mine[:, None] * KEY_BYTES, tl.arange(0, CHUNK)[None, :],
                           real[:, None], chunk, KEY_BYTES)  # fmt: skip
            logits = tl.dot(signs, queries[chunk], logits)
        logits = logits * _scale(key_tokens + mine, real)[:, None] + bias[None, :]
        logits = tl.where(real[:, None], logits, -float("inf"))
        peak = tl.maximum(largest, tl.max(logits, 0))
        shrink = tl.exp2(largest - peak)
        largest = peak
        weights = tl.exp2(logits - (peak - LIFT)[None, :])
        total = total * shrink + tl.sum(weights, 0)
        scaled = (weights * _scale(value_tokens + mine, real)[:, None]).to(tl.float16)
        gathered = ()
        for chunk in tl.static_range((8 * VALUE_BYTES + 31) // 32):
            signs = _signs(value_codes + mine[None, :] * VALUE_BYTES, tl.arange(0, CHUNK)[:, None],
                           real[None, :], chunk, VALUE_BYTES)  # fmt: skip
            gathered = gathered + (tl.dot(signs, scaled, sums[chunk] * shrink[None, :]),)
        sums = gathered
    share = 1 / tl.maximum(total, 1e-30)
    widths = tl.load(value_widths + part * D + channel).to(tl.int32)
    first = tl.cumsum(widths, 0) - widths
    output = tl.zeros([D, M], tl.float32)
    for chunk in tl.static_range((8 * VALUE_BYTES + 31) // 32):
        shares = tl.trans(_shares(first, widths, chunk))
        output = _product(shares, sums[chunk] * share[None, :], output)
    output *= tl.load(value_steps + part * D + channel).to(tl.float32)[:, None]
    output += tl.load(value_means + part * D + channel).to(tl.float32)[:, None]
    if VALUES_TURNED:
        output = _turned(output, D)
    slot = part * tl.num_programs(1) + split
    tl.store(out + slot * (G * D) + place, output, mask=head[None, :] < G)
    log = (largest - LIFT + tl.log2(tl.maximum(total, 1e-30))) / LOG2_E
    log = tl.where(total > 0, log, -float("inf"))
    tl.store(lse + slot * G + head, log, mask=head < G)


@triton.jit
def _shares(first, widths, chunk):
    """What each sign of a chunk counts in each direction, in steps: [32, D] fp16."""
    sign = (tl.arange(0, CHUNK) + chunk * CHUNK)[:, None] - first[None, :]
    inside = (sign >= 0) & (sign < widths[None, :])
    return tl.where(inside, tl.exp2(tl.where(inside, sign, 0).to(tl.float32)), 0).to(tl.float16)


@triton.jit
def _signs(codes, sign, real, chunk, BYTES: tl.constexpr):
    """A chunk's signs of some tokens, a half up or down in fp16; beyond a token's bytes anything.

    Args:
        codes: each token's first byte.
        sign: 0 to 31, along the other axis.
        real: which tokens there are.
    """
    byte = chunk * 4 + sign // 8
    bits = tl.load(codes + byte, mask=real & (byte < BYTES), other=0)
    return ((bits >> (sign % 8)) & 1).to(tl.float16) - 0.5


@triton.jit
def _scale(tokens, real):
    """What multiplies each token, from its logarithm in 8 bits."""
    logarithm = tl.load(tokens, mask=real, other=0).to(tl.float32)
    return tl.exp2((logarithm - 128.0) * 0.03125)


@triton.jit
def _turned(columns, D: tl.constexpr):
    """Columns [D, M] times a Hadamard matrix."""
    channel = tl.arange(0, D)
    matrix = negative_where_odd(channel[:, None] & channel[None, :])
    return _product(matrix, columns, tl.zeros_like(columns)) * (D**-0.5)


@triton.jit
def _product(left, right, total):
    """Of a matrix that fp16 holds and one that it does not: as two numbers, nothing is lost."""
    coarse = right.to(tl.float16)
    rest = (right - coarse.to(tl.float32)).to(tl.float16)
    return tl.dot(left, rest, tl.dot(left, coarse, total))
