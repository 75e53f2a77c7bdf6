"""Decode attention over ragged heads of mixed formats: one launch a layer.

A program takes one tile, a run of pages of one head, attends to it with all query heads of the
group, and leaves output and log-sum-exp in scratch; the last of a head's programs to arrive merges
them (Dao et al., "Flash-Decoding", 2023, with the second kernel folded into the first). Pages are
dequantised in registers. The formats that occur are compiled in, one loop for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import (
    FP8,
    HALF,
    code_bytes,
    groups_of,
    has_head_scale,
    is_float,
    is_signs,
    is_turned,
    keys_of,
    page_tokens,
    plain_code,
    scale_bytes,
    values_of,
    whole_scale,
)
from kvtune.runtime.kernels.logits import load_queries, logits_of
from kvtune.runtime.kernels.merging import LOG2_E, merge
from kvtune.runtime.kernels.signs import RUN, spread_queries, store_channels
from kvtune.runtime.kernels.values import add_values, store_parts, sums_of

TILE_FIELDS = tl.constexpr(16)
HEAD_FIELD = tl.constexpr(15)  # of a seat's tile: which of its sequence's KV heads
LIFT = tl.constexpr(6.0)  # weights are 2^6 times too large, which keeps small ones normal in fp16


@triton.jit
def decode_attention(
    q, out, row_lse, logits_out,
    pool_half, pool_bf16, pool_fp8,
    tiles, table, lengths, fp8_scales,
    scratch, scratch_lse, gathered, arrived, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    PAIRS: tl.constexpr, N_PAIRS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr, EXPORT: tl.constexpr,
    seats=None, query_stride=0, H: tl.constexpr = 1, SEAT_TILES: tl.constexpr = 0,
    SIGNS: tl.constexpr = 0,
):  # fmt: skip
    """One tile; see ``tiles.Tile`` for its fields.

    Where SEAT_TILES is set, the second program index is a sequence of the step, whose tiles are
    those of its seat; then any sequence may have any seat, and a captured launch goes on.

    Args:
        q: [rows, G, D], a row is a sequence's KV head; [sequences, H * G, D] by ``query_stride``
            where sequences have seats.
        out: [rows, G, D], any float type.
        row_lse: [rows, G] float32, natural log-sum-exp.
        logits_out: [G, tokens that there are pages for] float32, written where EXPORT.
        pool_*: the pool's memory, as three types.
        tiles: [n, 16] int32.
        table: int32, a cell for every page, by segment.
        lengths: [segments] int32 tokens.
        fp8_scales: [segments, 2] float32.
        scratch, scratch_lse: [slots, G, D], [slots, G] float32.
        gathered: [slots, SIGNS, G] float32, where values are rows of signs.
        arrived: [rows] int32 zeros, and zeros again afterwards.
        seats: [sequences] int32 the seat of each; negative where there is no sequence.
        H: KV heads of a sequence with a seat.
        SEAT_TILES: tiles of a seat; 0 where sequences have none.
        SIGNS: of a value, at most.
    """
    row, query, tile, pair = _tile_of(q, tiles, seats, query_stride, D, G, H, SEAT_TILES)
    at, first, most = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    segment, slot, others = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    # others: slots of this row before this one * 65536 + all of them
    known, cell, second = tl.load(tile + 8), tl.load(tile + 9), tl.load(tile + 10)
    tables = tl.load(tile + 12).to(tl.int64) * (4 * D)
    length = tl.load(lengths + segment, mask=known < 0, other=known)
    tokens = tl.minimum(length - first, most)
    if EXPORT:
        logits_out += tl.load(tile + 11)
    for n in tl.static_range(N_PAIRS):
        if pair == PAIRS[n]:
            _attend_tile(
                query, scratch + slot * G * D, scratch_lse + slot * G,
                gathered + slot * G * SIGNS, logits_out,
                pool_half, pool_bf16, pool_fp8, tables,
                table, at, cell, second, tokens, fp8_scales + 2 * segment, softmax_scale,
                D, G, M, keys_of(PAIRS[n]), values_of(PAIRS[n]),
                STAGES, _halves_a_step(PAIRS[n]), NATIVE, EXPORT,
            )  # fmt: skip
    tl.debug_barrier()  # every thread's part is stored before the program is counted
    count = tl.where(pair < 0, 0, others % 65536)
    if count > 0:  # noqa: SIM102 (an empty record's row is nobody's; kernels do not shortcut "and")
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == count - 1:
            base = slot - others // 65536
            merge(scratch + base * G * D, scratch_lse + base * G, count,
                  out + row * G * D, row_lse + row * G, D, G, M)  # fmt: skip
            tl.store(arrived + row, 0)


@triton.jit
def _tile_of(q, tiles, seats, query_stride, D: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
             SEAT_TILES: tl.constexpr):  # fmt: skip
    """This program's row, its queries, its record, and its formats: negative where it has none."""
    if SEAT_TILES:
        member = tl.program_id(1)
        seat = tl.load(seats + member)
        tile = tiles + (tl.maximum(seat, 0) * SEAT_TILES + tl.program_id(0)) * TILE_FIELDS
        head = tl.load(tile + HEAD_FIELD)
        row, query = member * H + head, q + member.to(tl.int64) * query_stride + head * (G * D)
        pair = tl.where(seat < 0, -1, tl.load(tile + 1))
    else:
        tile = tiles + tl.program_id(0) * TILE_FIELDS
        row, pair = tl.load(tile), tl.load(tile + 1)
        query = q + row * G * D
    return row, query, tile, pair


@triton.jit
def _attend_tile(
    q, scratch, scratch_lse, gathered, logits_out,
    pool_half, pool_bf16, pool_fp8, tables,
    table, at, cell, second, tokens, fp8_scales, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    KEY_CODE: tl.constexpr, VALUE_CODE: tl.constexpr,
    STAGES: tl.constexpr, HALVES: tl.constexpr, NATIVE: tl.constexpr, EXPORT: tl.constexpr,
):  # fmt: skip
    """Attend to ``tokens`` tokens whose pages begin at table entry ``at``, a step at a time.

    A step is 64 tokens, or 32 where both keys and values are floats: programs of all formats then
    take about as much room, and as many of them run at once. That is a page, half of one, or two of
    16 tokens. Where keys are rotated so are the queries, once; where values are, the output is
    rotated back, once.
    """
    KEYS: tl.constexpr = plain_code(KEY_CODE)
    VALUES: tl.constexpr = plain_code(VALUE_CODE)
    PARTS: tl.constexpr = sums_of(VALUES, D)
    W: tl.constexpr = RUN if is_signs(VALUES) else D // PARTS
    TOKENS: tl.constexpr = page_tokens(KEYS, VALUES)
    PAIRED: tl.constexpr = TOKENS < HALF
    STEPS: tl.constexpr = _steps_a_page(TOKENS, HALVES)
    VALUES_AT: tl.constexpr = code_bytes(KEYS, D, TOKENS) + scale_bytes(KEYS, D)
    head = tl.arange(0, M)
    factor = softmax_scale * LOG2_E * _tensor_scale(fp8_scales, KEYS, D)
    value_scale = _tensor_scale(fp8_scales + 1, VALUES, D)
    if is_signs(KEYS):
        queries, query_sums = spread_queries(q, factor, pool_half, tables, D, G, M, KEYS)
    else:
        queries, query_sums = load_queries(q, factor, D, G, M, KEYS, is_turned(KEY_CODE))
    acc, shifts = _zeros(M, W, PARTS), _zeros(M, HALF, groups_of(VALUES, D))
    totals = tl.zeros([HALF, M], tl.float32)  # summed over tokens at the end
    largest = tl.full([M], -1e30, tl.float32)
    cell = tl.load(table + at, mask=cell < 0, other=cell)
    if PAIRED:
        second = tl.load(table + at + 1, mask=second < 0, other=second)
    for step in tl.range(0, tl.cdiv(tokens, HALF * HALVES), num_stages=STAGES):
        start = cell.to(tl.int64) * (4 * D)
        gap, begin = 0, 0
        if PAIRED:  # a second page that is not there is read as the first one, whose rest is finite
            real = tokens > step * HALF + TOKENS
            gap = tl.where(real, second - cell, 0).to(tl.int64) * (2 * D) - TOKENS * D
            following = table + at + 2 * step + 2
            cell, second = tl.load(following), tl.load(following + 1)  # before they are needed
        else:
            cell = tl.load(table + at + (step + 1) // STEPS)  # likewise
            begin = (step % STEPS) * HALF
        halves = logits_of(queries, query_sums, pool_half, pool_bf16, pool_fp8, start, gap, begin,
                           factor, D, M, KEYS, HALVES, PAIRED, NATIVE)  # fmt: skip
        if EXPORT:
            _export(logits_out, halves, step, tokens, G, M, HALVES, EXPORT)
        weights, shrink, largest, totals = _weigh(halves, step, tokens, largest, totals, HALVES)
        acc, shifts = add_values(acc, shifts, shrink, weights, pool_half, pool_bf16, pool_fp8,
                                 start + VALUES_AT, gap, begin,
                                 D, VALUES, HALVES, PAIRED, NATIVE)  # fmt: skip
    total = tl.sum(totals, 0)
    lse = tl.where(total > 0, (largest - LIFT + tl.log2(total)) / LOG2_E, -float("inf"))
    tl.store(scratch_lse + head, lse, mask=head < G)
    if is_signs(VALUES):
        store_channels(scratch, gathered, acc, shifts, total, pool_half, tables,
                       D, G, M, KEYS, VALUES, is_turned(VALUE_CODE))  # fmt: skip
    else:
        store_parts(scratch, acc, shifts, total, value_scale, D, G, M, VALUES, PARTS,
                    is_turned(VALUE_CODE))  # fmt: skip


@triton.jit
def _tensor_scale(fp8_scale, CODE: tl.constexpr, D: tl.constexpr):
    """What multiplies all of a head's keys, or values."""
    scale = tl.full([], whole_scale(CODE, D), tl.float32)
    if CODE == FP8 or has_head_scale(CODE):
        scale *= tl.load(fp8_scale)
    return scale


@triton.jit
def _export(logits_out, halves, step, tokens, G: tl.constexpr, M: tl.constexpr,
            HALVES: tl.constexpr, EXPORT: tl.constexpr):  # fmt: skip
    """A step's logits to where they are wanted, EXPORT being the tokens of a query's row."""
    head, token = tl.arange(0, M)[None, :], tl.arange(0, HALF)[:, None]
    for half in tl.static_range(HALVES):
        place = token + (step * HALVES + half) * HALF
        tl.store(logits_out + head * EXPORT + place, halves[half] / LOG2_E,
                 mask=(place < tokens) & (head < G))  # fmt: skip


@triton.jit
def _weigh(halves, step, tokens, largest, totals, HALVES: tl.constexpr):
    """A step's weights by half page, 2^LIFT times too large, beside the largest logit so far; what
    sums before it are multiplied by; and the new largest logit and sums of weights."""
    token = tl.arange(0, HALF)[:, None]
    logits = ()
    for half in tl.static_range(HALVES):
        real = token + (step * HALVES + half) * HALF < tokens
        logits = logits + (tl.where(real, halves[half], -float("inf")),)
    peak = tl.maximum(largest, tl.max(_highest(logits, HALVES), 0))
    shrink = tl.exp2(largest - peak)
    totals = totals * shrink[None, :]
    weights = ()
    for half in tl.static_range(HALVES):
        weight = tl.exp2(logits[half] - (peak - LIFT)[None, :])
        totals += weight
        weights = weights + (weight,)
    return weights, shrink, peak, totals


@triton.jit
def _highest(halves, HALVES: tl.constexpr):
    """Of a step's logits, by place in a half page."""
    if HALVES == 2:
        highest = tl.maximum(halves[0], halves[1])
    else:
        highest = halves[0]
    return highest


@triton.constexpr_function
def _halves_a_step(pair):
    """Half pages a step: integers, and signs, of two halves share a unit."""
    return 1 if is_float(keys_of(pair)) and is_float(values_of(pair)) else 2


@triton.constexpr_function
def _steps_a_page(tokens, halves):
    """Steps that a page takes, where it is not a part of one."""
    return max(tokens // (32 * halves), 1)


@triton.jit
def _zeros(M: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([W, M], tl.float32),)
    return parts
