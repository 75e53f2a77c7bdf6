"""Rows of signs inside decode attention: what a step's keys say, and what its values add.

A channel of b bits is b signs, of which sign p counts 2^p steps of the channel. A query is spread
over the signs of its channels once a tile, so that keys are one product of bits whatever widths
their channels have; values are gathered by sign, and brought back to channels once. A bit is masked
out of its byte as it lies, a number below the normal ones (``unpacking``): that it stands for
half a step up or down is put right by the sums over all signs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import HALF, code_bytes, sign_bytes
from kvtune.runtime.kernels.turning import mixed
from kvtune.runtime.kernels.turning import signs as hadamard
from kvtune.runtime.kernels.unpacking import mask_of

RUN = tl.constexpr(16)  # bytes that are read at once
WIDEST = tl.constexpr(6)  # bits of a channel at most
BLOCK = tl.constexpr(32)  # channels that outputs are made of at once


@triton.constexpr_function
def sign_runs(code, head_dim):
    """Runs of bytes of a token; the last one may go on into what lies behind."""
    return (sign_bytes(code, head_dim) + 15) // 16


@triton.constexpr_function
def _tables_at(which, code, head_dim):
    """Where tables begin among a head's, in bytes: see ``reference_signs``."""
    signs = 8 * sign_bytes(code, head_dim)
    return {
        "key means": 0, "value means": 2 * head_dim, "value steps": 4 * head_dim,
        "value firsts": 6 * head_dim, "key amounts": 8 * head_dim,
        "key channels": 8 * head_dim + 2 * signs, "value widths": 8 * head_dim + 3 * signs,
    }[which]  # fmt: skip


@triton.constexpr_function
def _unit(field):
    """What a masked bit counts of one."""
    return 2.0 ** (24 - field)


@triton.jit
def spread_queries(q, factor, pool_half, tables, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                   KEYS: tl.constexpr):  # fmt: skip
    """The group's queries [16, M] fp16 by run and bit, times ``factor``; and beside them what
    means [M] and half of all signs [M] add to a logit."""
    BYTES: tl.constexpr = sign_bytes(KEYS, D)
    head, byte = tl.arange(0, M)[None, :], tl.arange(0, RUN)
    pool_bytes = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + tables
    pool_half += tables // 2
    amounts = pool_half + _tables_at("key amounts", KEYS, D) // 2
    channels = pool_bytes + _tables_at("key channels", KEYS, D)
    # All of one kind before what waits for it: a program waits three times, not for every bit.
    places, counts, loaded = (), (), ()
    for run in tl.static_range(sign_runs(KEYS, D)):
        real = byte + run * RUN < BYTES
        for field in tl.static_range(8):
            sign = (byte + run * RUN) * 8 + field
            places = places + (tl.load(channels + sign, mask=real, other=0).to(tl.int32),)
            counts = counts + (tl.load(amounts + sign, mask=real, other=0).to(tl.float32),)
    for part in tl.static_range(8 * sign_runs(KEYS, D)):
        place = head * D + places[part][:, None]
        loaded = loaded + (tl.load(q + place, mask=head < G, other=0),)
    queries, half = (), tl.zeros([RUN, M], tl.float32)
    for part in tl.static_range(8 * sign_runs(KEYS, D)):
        amount = counts[part] * factor
        spread = (loaded[part].to(tl.float32) * amount[:, None]).to(tl.float16)
        half += spread.to(tl.float32)
        # As much smaller as the bit is larger than a byte's lowest.
        queries = queries + (spread * tl.full([1, 1], 2.0 ** -(part % 8), tl.float16),)
    shift = tl.zeros([BLOCK, M], tl.float32)
    some = tl.arange(0, BLOCK)
    for first in tl.static_range(0, D, 32):
        mean = tl.load(pool_half + _tables_at("key means", KEYS, D) // 2 + first + some)
        query = tl.load(q + head * D + (first + some)[:, None], mask=head < G, other=0)
        shift += query.to(tl.float32) * (mean.to(tl.float32) * factor)[:, None]
    sums = (tl.sum(shift, 0), tl.sum(half, 0) * -0.5)
    return queries, sums


@triton.jit
def sign_logits(queries, sums, pool_half, start, D: tl.constexpr, M: tl.constexpr,
                KEYS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Logits of a page by halves, each [32, M]."""
    BYTES: tl.constexpr = sign_bytes(KEYS, D)
    RUNS: tl.constexpr = sign_runs(KEYS, D)
    token, byte = tl.arange(0, HALF), tl.arange(0, RUN)
    units = ()
    for run in tl.static_range(RUNS):
        place = token[:, None] * BYTES + (byte + run * RUN)[None, :]
        units = units + (tl.load(pool_half + start // 2 + place),)
    scales = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + start + code_bytes(KEYS, D)
    logits = ()
    for half in tl.static_range(2):
        products = tl.zeros([HALF, M], tl.float32)
        for run in tl.static_range(RUNS):
            low = lowered(units[run], half, NATIVE)
            for field in tl.static_range(8):
                bits = bit_of(low, field, NATIVE)
                products = tl.dot(bits, queries[run * 8 + field], products)
        scale = token_scale(tl.load(scales + half * HALF + token))
        level = products * _unit(0) + sums[1][None, :]
        logits = logits + (level * scale[:, None] + sums[0][None, :],)
    return logits


@triton.jit
def add_sign_values(acc, shifts, shrink, weights, pool_half, start, D: tl.constexpr,
                    VALUES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Sums [16, M] by run and bit, and those of all weights times tokens' scales, after a page."""
    RUNS: tl.constexpr = sign_runs(VALUES, D)
    token, byte = tl.arange(0, HALF), tl.arange(0, RUN)
    scales = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + start + code_bytes(VALUES, D)
    shift = shifts[0] * shrink[None, :]
    scaled = ()
    for half in tl.static_range(2):
        scale = token_scale(tl.load(scales + half * HALF + token))
        weight = (weights[half] * scale[:, None]).to(tl.float16)
        shift += weight.to(tl.float32)
        scaled = scaled + (weight,)
    added = ()
    for run in tl.static_range(RUNS):
        place = (byte + run * RUN)[:, None] * HALF + token[None, :]
        units = tl.load(pool_half + start // 2 + place)
        low, high = lowered(units, 0, NATIVE), lowered(units, 1, NATIVE)
        for field in tl.static_range(8):
            sums = acc[run * 8 + field] * shrink[None, :]
            sums = tl.dot(bit_of(low, field, NATIVE), scaled[0], sums)
            added = added + (tl.dot(bit_of(high, field, NATIVE), scaled[1], sums),)
    return added, (shift,)


@triton.jit
def store_channels(scratch, gathered, acc, shifts, total, pool_half, tables, D: tl.constexpr,
                   G: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                   TURNED: tl.constexpr):  # fmt: skip
    """The output by channel, out of sums by sign that go by way of memory, which finds them.

    Args:
        gathered: [signs, G] float32 of this program's own.
    """
    BYTES: tl.constexpr = sign_bytes(VALUES, D)
    head, byte = tl.arange(0, M)[None, :], tl.arange(0, RUN)
    for run in tl.static_range(sign_runs(VALUES, D)):
        for field in tl.static_range(8):
            sign = ((byte + run * RUN) * 8 + field)[:, None]
            real = (byte + run * RUN < BYTES)[:, None] & (head < G)
            tl.store(gathered + sign * G + head, acc[run * 8 + field] * _unit(field), mask=real)
    tl.debug_barrier()
    share = 1.0 / tl.maximum(total, 1e-30)
    all_weights = tl.sum(shifts[0], 0) * share
    pool_bytes = pool_half.to(tl.pointer_type(tl.uint8), bitcast=True) + tables
    pool_half += tables // 2
    pool_short = pool_half.to(tl.pointer_type(tl.int16), bitcast=True)
    some = tl.arange(0, BLOCK)
    means, steps, firsts, widths, blocks = (), (), (), (), ()
    for block in tl.static_range(D // 32):
        channel = block * 32 + some
        mean = tl.load(pool_half + _tables_at("value means", KEYS, D) // 2 + channel)
        step = tl.load(pool_half + _tables_at("value steps", KEYS, D) // 2 + channel)
        first = tl.load(pool_short + _tables_at("value firsts", KEYS, D) // 2 + channel)
        width = tl.load(pool_bytes + _tables_at("value widths", KEYS, D) + channel)
        means, steps = means + (mean.to(tl.float32),), steps + (step.to(tl.float32),)
        firsts, widths = firsts + (first.to(tl.int32),), widths + (width.to(tl.int32),)
    there = tl.where(total > 0, 1.0, 0.0)[None, :]
    for block in tl.static_range(D // 32):
        sums = ()
        for bit in tl.static_range(WIDEST):  # all are on their way before one is waited for
            place = (firsts[block] + bit)[:, None] * G + head
            real = (bit < widths[block])[:, None] & (head < G)
            sums = sums + (tl.load(gathered + place, mask=real, other=0, cache_modifier=".cg"),)
        levels = tl.zeros([BLOCK, M], tl.float32)
        for bit in tl.static_range(WIDEST):
            levels += sums[bit] * (1 << bit)
        middle = ((1 << widths[block]) - 1).to(tl.float32) * 0.5
        levels = levels * share[None, :] - middle[:, None] * all_weights[None, :]
        output = levels * steps[block][:, None] + means[block][:, None] * there
        blocks = blocks + (output,)
    if TURNED:
        _store_turned(scratch, blocks, D, G, M)
    else:
        for block in tl.static_range(D // 32):
            place = head * D + (block * 32 + some)[:, None]
            tl.store(scratch + place, blocks[block], mask=head < G)


@triton.jit
def _store_turned(scratch, blocks, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """Outputs by block of channels, rotated back; each as two numbers of fp16."""
    head, channel = tl.arange(0, M)[None, :], tl.arange(0, BLOCK)
    matrix = hadamard(channel, channel)
    turned = mixed(blocks, D // 32)
    for block in tl.static_range(D // 32):
        output = turned[block] * (D**-0.5)
        coarse = output.to(tl.float16)
        rest = (output - coarse.to(tl.float32)).to(tl.float16)
        sums = tl.dot(matrix, rest, tl.dot(matrix, coarse))
        place = head * D + (block * 32 + channel)[:, None]
        tl.store(scratch + place, sums, mask=head < G)


@triton.jit
def token_scale(logarithm):
    """What multiplies a token's channels, from its logarithm in 8 bits."""
    return tl.exp2((logarithm.to(tl.float32) - 128.0) * 0.03125)


@triton.jit
def lowered(units, HALF_PAGE: tl.constexpr, NATIVE: tl.constexpr):
    """Units whose lower byte is that of one half page; above it anything."""
    if HALF_PAGE == 0:
        low = units
    elif NATIVE:
        low = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 8;", "=r,r", [units], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        low = (units.to(tl.uint16, bitcast=True) >> 8).to(tl.float16, bitcast=True)
    return low


@triton.jit
def bit_of(units, FIELD: tl.constexpr, NATIVE: tl.constexpr):
    """One bit of each unit's lower byte as fp16 whose bits it is."""
    if NATIVE:
        bits = tl.inline_asm_elementwise(
            mask_of(0, 1 << FIELD), "=r,r", [units], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        bits = (units.to(tl.uint16, bitcast=True) & (1 << FIELD)).to(tl.float16, bitcast=True)
    return bits
