"""Decode attention over packed buffers where they lie: a program a tile of one head's tokens.

How a section of tokens is read is said by ``policies.packed``; a program is compiled for one
reading of keys and one of values. It finds every byte through the page table, makes numbers of 32
tokens at a time in registers, and leaves output and log-sum-exp of its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.merging import LOG2_E
from kvtune.runtime.kernels.packed_numbers import (
    RANK,
    SECTION_FIELDS,
    STEP,
    TABLE_AT,
    has_outliers,
    left_factors,
    numbers_of,
    outliers_of,
    prepared,
    rank_of,
    right_factors,
    some_outliers,
)

TILE_FIELDS = tl.constexpr(8)
# Outliers that are looked at together, a power of two: KVQuant's 1 % are 41 of a step's 32 * 128
# numbers, so that one round is enough; GEAR's 2 % take two. Reasoned, not measured beside others.
SOME = tl.constexpr(64)


@triton.jit
def attend_packed(
    q, pool, table, sections, tiles, log_weights, out, lse, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Attention of a group's queries over one tile.

    Args:
        q: [queries, G, D] float32.
        pool: the pool's memory, bytes.
        table: int32, first cells of each part's pages, part by part.
        sections: [n, 18] int32: see ``packed_numbers``.
        tiles: [programs, 8] int32: which of the queries, section of keys, section of values, first
            token among either's, tokens, slot, first log-weight. Where there are no tokens, nothing
            else is read, and nothing written: the row has ended, and its pages hold others' bytes.
        log_weights: float32, where WEIGHTED.
        out, lse: [slots, G, D], [slots, G] float32.
    """
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + 5)
    if count == 0:
        return
    q += tl.load(tile).to(tl.int64) * (G * D)
    keys = sections + tl.load(tile + 1) * SECTION_FIELDS
    values = sections + tl.load(tile + 2) * SECTION_FIELDS
    key_first, value_first = tl.load(tile + 3), tl.load(tile + 4)
    slot = tl.load(tile + 6).to(tl.int64)
    table += tl.load(keys + TABLE_AT)
    log_weights += tl.load(tile + 7)
    head, channel, token = tl.arange(0, M), tl.arange(0, D), tl.arange(0, STEP)
    mine = head[:, None] * D + channel[None, :]
    queries = tl.load(q + mine, mask=(head < G)[:, None], other=0)
    factor = softmax_scale * LOG2_E
    key_known = prepared(pool, table, keys, D, KEYS)
    value_known = prepared(pool, table, values, D, VALUES)
    if rank_of(KEYS) > 0:
        reduced = tl.dot(queries, tl.trans(right_factors(pool, table, keys, D, KEYS)),
                         input_precision="ieee")  # fmt: skip
    acc = tl.zeros([M, D], tl.float32)
    across = tl.zeros([M, RANK], tl.float32)  # by column of the values' factors
    largest, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)
    narrow = queries.to(tl.float16)
    for step in tl.range(0, count, STEP, num_stages=1):
        there = step + token < count
        numbers = numbers_of(pool, table, keys, key_known, key_first + step, there, D, KEYS, True)
        logits = tl.dot(narrow, numbers.to(tl.float16))
        if rank_of(KEYS) > 0:
            left = left_factors(pool, table, keys, key_first + step, there, D, KEYS)
            logits += tl.dot(reduced, tl.trans(left), input_precision="ieee")
        if has_outliers(KEYS):
            logits = _with_key_outliers(logits, q, pool, table, keys, key_first + step,
                                        D, G, M, KEYS)  # fmt: skip
        logits *= factor
        if WEIGHTED:
            logits += (tl.load(log_weights + step + token, mask=there, other=0) * LOG2_E)[None, :]
        logits = tl.where(there[None, :], logits, -float("inf"))
        peak = tl.maximum(largest, tl.max(logits, 1))
        shrink, weights = tl.exp2(largest - peak), tl.exp2(logits - peak[:, None])
        total, largest = total * shrink + tl.sum(weights, 1), peak
        numbers = numbers_of(pool, table, values, value_known, value_first + step, there,
                             D, VALUES, False)  # fmt: skip
        acc = tl.dot(weights.to(tl.float16), numbers.to(tl.float16), acc * shrink[:, None])
        if rank_of(VALUES) > 0:
            left = left_factors(pool, table, values, value_first + step, there, D, VALUES)
            across = across * shrink[:, None] + tl.dot(weights, left, input_precision="ieee")
        if has_outliers(VALUES):
            acc = _with_value_outliers(acc, weights, pool, table, values, value_first + step,
                                       D, VALUES)  # fmt: skip
    if rank_of(VALUES) > 0:
        right = right_factors(pool, table, values, D, VALUES)
        acc += tl.dot(across, right, input_precision="ieee")
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(out + slot * (G * D) + mine, acc, mask=(head < G)[:, None])
    all_of = tl.where(total > 0, (largest + tl.log2(total)) / LOG2_E, -float("inf"))
    tl.store(lse + slot * G + head, all_of, mask=head < G)


@triton.jit
def _with_key_outliers(logits, q, pool, table, section, first, D: tl.constexpr, G: tl.constexpr,
                       M: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Logits [M, 32] and what the step's outliers add: each query's channel of each, to its
    token."""
    head, place = tl.arange(0, M)[:, None], tl.arange(0, STEP)[None, :]
    begin, end = outliers_of(pool, table, section, first, D)
    for at in tl.range(begin, end, SOME, num_stages=1):
        token, channel, number = some_outliers(pool, table, section, at, end, D, SOME)
        query = tl.load(q + head * D + channel[None, :], mask=head < G, other=0)
        added = query * number[None, :]
        logits = tl.dot(added, (token[:, None] == place).to(tl.float32), logits)
    return logits


@triton.jit
def _with_value_outliers(acc, weights, pool, table, section, first, D: tl.constexpr,
                         VALUES: tl.constexpr):  # fmt: skip
    """Sums [M, D] and what the step's outliers add: their tokens' weights, to their channels."""
    channels, place = tl.arange(0, D)[None, :], tl.arange(0, STEP)[:, None]
    begin, end = outliers_of(pool, table, section, first, D)
    for at in tl.range(begin, end, SOME, num_stages=1):
        token, channel, number = some_outliers(pool, table, section, at, end, D, SOME)
        weight = tl.dot(weights, (place == token[None, :]).to(tl.float32))
        added = weight * number[None, :]
        acc = tl.dot(added, (channel[:, None] == channels).to(tl.float32), acc)
    return acc
