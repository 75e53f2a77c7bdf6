"""Decode attention over ragged heads of mixed formats: one launch a layer.

A program takes one tile, a run of pages of one head, attends to it with all query heads of the
group, and leaves output and log-sum-exp in scratch; the last of a head's programs to arrive merges
them (Dao et al., "Flash-Decoding", 2023, with the second kernel folded into the first). Pages are
dequantised in registers. The formats that occur are compiled in, one loop for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
HALF = tl.constexpr(32)
BF16 = tl.constexpr(16)
FP8 = tl.constexpr(9)
TILE_FIELDS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(6.0)  # weights are 2^6 times too large, which keeps small ones normal in fp16


@triton.jit
def decode_attention(
    q, out, row_lse, logits_out,
    pool_half, pool_bf16, pool_fp8,
    tiles, table, lengths, fp8_scales,
    scratch, scratch_lse, arrived, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    PAIRS: tl.constexpr, N_PAIRS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr, EXPORT: tl.constexpr,
):  # fmt: skip
    """One tile; see ``tiles.Tile`` for its fields.

    Args:
        q: [rows, G, D], a row is a sequence's KV head.
        out: [rows, G, D], any float type.
        row_lse: [rows, G] float32, natural log-sum-exp.
        logits_out: [G, 64 * table entries] float32, written where EXPORT.
        pool_*: the pool's memory, as three types.
        tiles: [n, 16] int32.
        table: int32, a cell for every page, by segment.
        lengths: [segments] int32 tokens.
        fp8_scales: [segments, 2] float32.
        scratch, scratch_lse: [slots, G, D], [slots, G] float32.
        arrived: [rows] int32 zeros, and zeros again afterwards.
    """
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    row, pair = tl.load(tile), tl.load(tile + 1)
    at, first, pages = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    segment, slot, others = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    # others: slots of this row before this one * 65536 + all of them
    known, cell = tl.load(tile + 8), tl.load(tile + 9)
    length = tl.load(lengths + segment, mask=known < 0, other=known)
    tokens = tl.minimum(length - first, pages * PAGE)
    for n in tl.static_range(N_PAIRS):
        if pair == PAIRS[n]:
            _attend_tile(
                q + row * G * D, scratch + slot * G * D, scratch_lse + slot * G, logits_out,
                pool_half, pool_bf16, pool_fp8,
                table, at, cell, tokens, fp8_scales + 2 * segment, softmax_scale,
                D, G, M, PAIRS[n] // 32, PAIRS[n] % 32,
                STAGES, _halves_a_step(PAIRS[n]), NATIVE, EXPORT,
            )  # fmt: skip
    tl.debug_barrier()  # every thread's part is stored before the program is counted
    count = others % 65536
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == count - 1:
        base = slot - others // 65536
        _merge(scratch + base * G * D, scratch_lse + base * G, count,
               out + row * G * D, row_lse + row * G, D, G, M)  # fmt: skip
        tl.store(arrived + row, 0)


@triton.jit
def _attend_tile(
    q, scratch, scratch_lse, logits_out,
    pool_half, pool_bf16, pool_fp8,
    table, at, cell, tokens, fp8_scales, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    STAGES: tl.constexpr, HALVES: tl.constexpr, NATIVE: tl.constexpr, EXPORT: tl.constexpr,
):  # fmt: skip
    """Attend to ``tokens`` tokens whose pages begin at table entry ``at``, a step at a time.

    A step is a page, or half of one where both keys and values are floats: programs of all formats
    then take about as much room, and as many of them run at once.
    """
    PARTS: tl.constexpr = _parts(VALUES, D)
    W: tl.constexpr = D // PARTS
    STEPS: tl.constexpr = 2 // HALVES  # of a page
    VALUES_AT: tl.constexpr = _code_bytes(KEYS, D) + _scale_bytes(KEYS, D)
    head, token = tl.arange(0, M), tl.arange(0, HALF)
    factor = softmax_scale * LOG2_E
    value_scale = 1.0
    if KEYS == FP8:
        factor *= tl.load(fp8_scales)
    if VALUES == FP8:
        value_scale = tl.load(fp8_scales + 1)
    queries = _queries(q, D, G, M, KEYS)
    acc, shifts = _zeros(M, W, PARTS), _zeros(M, HALF, _groups(VALUES, D))
    totals = tl.zeros([HALF, M], tl.float32)  # summed over tokens at the end
    largest = tl.full([M], -1e30, tl.float32)
    cell = tl.load(table + at, mask=cell < 0, other=cell)
    for step in tl.range(0, tl.cdiv(tokens, HALF * HALVES), num_stages=STAGES):
        start = cell.to(tl.int64) * (4 * D)
        cell = tl.load(table + at + (step + 1) // STEPS)  # the next one, before it is needed
        begin = (step % STEPS) * HALF
        halves = _logits(queries, pool_half, pool_bf16, pool_fp8, start, begin, factor,
                         D, M, KEYS, HALVES, NATIVE)  # fmt: skip
        logits = ()
        for half in tl.static_range(HALVES):
            place = token + (step * HALVES + half) * HALF
            if EXPORT:
                tl.store(logits_out + head[None, :] * EXPORT + (place + at * PAGE)[:, None],
                         halves[half] / LOG2_E, mask=head[None, :] < G)  # fmt: skip
            known = tl.where((place < tokens)[:, None], halves[half], -float("inf"))
            logits = logits + (known,)
        peak = tl.maximum(largest, tl.max(_highest(logits, HALVES), 0))
        shrink = tl.exp2(largest - peak)
        largest = peak
        weights = ()
        totals = totals * shrink[None, :]
        for half in tl.static_range(HALVES):
            weight = tl.exp2(logits[half] - (peak - LIFT)[None, :])
            totals += weight
            weights = weights + (weight,)
        acc, shifts = _add_values(acc, shifts, shrink, weights, pool_half, pool_bf16, pool_fp8,
                                  start + VALUES_AT, begin, D, VALUES, HALVES, NATIVE)  # fmt: skip
    total = tl.sum(totals, 0)
    share = value_scale / tl.maximum(total, 1e-30)
    FIELDS: tl.constexpr = _fields(VALUES)
    channel = tl.arange(0, W)
    for part in tl.static_range(PARTS):
        first = (part % FIELDS) * (D // FIELDS) + (part // FIELDS) * W
        output = acc[part]
        if VALUES < FP8:
            shift = tl.sum(shifts[_group(part, VALUES, D)], 0)
            output = output * _unit(part % FIELDS, VALUES) + shift[None, :]
        tl.store(scratch + head[None, :] * D + first + channel[:, None],
                 output * share[None, :], mask=head[None, :] < G)  # fmt: skip
    lse = tl.where(total > 0, (largest - LIFT + tl.log2(total)) / LOG2_E, -float("inf"))
    tl.store(scratch_lse + head, lse, mask=head < G)


@triton.jit
def _logits(queries, pool_half, pool_bf16, pool_fp8, start, begin, factor,
            D: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
            NATIVE: tl.constexpr):  # fmt: skip
    """Logits of a step by half pages, each [32, M]."""
    FIELDS: tl.constexpr = _fields(KEYS)
    W: tl.constexpr = D // FIELDS
    channel, token = tl.arange(0, W), tl.arange(0, HALF)
    place = token[:, None] * W + channel[None, :]
    logits = ()
    if KEYS >= FP8:
        for half in tl.static_range(HALVES):
            at = start + (begin + half * HALF) * D  # of fp8, and of bf16 from the page's start
            if KEYS == BF16:
                keys = tl.load(pool_bf16 + start // 2 + (begin + half * HALF) * D + place)
                logits = logits + (_product(keys, queries[0], NATIVE) * factor,)
            else:
                keys = tl.load(pool_fp8 + at + place).to(tl.float16)
                logits = logits + (tl.dot(keys, queries[0]) * factor,)
    else:
        codes = tl.load(pool_half + start // 2 + place)
        every = pool_half + (start + _code_bytes(KEYS, D)) // 2 + tl.arange(0, D)
        scales = _by_field(tl.load(every), W, FIELDS)
        offsets = _by_field(tl.load(every + D), W, FIELDS)
        bias = tl.zeros([16, M], tl.float32)
        scaled = ()
        for field in tl.static_range(FIELDS):
            bias = tl.dot(tl.broadcast_to(offsets[field][None, :], [16, W]), queries[field], bias)
            scale = scales[field] * tl.full([1], 1.0 / (1 << (field * KEYS)), tl.float16)
            scaled = scaled + (queries[field] * scale[:, None],)
        shift = tl.max(bias, 0) * factor
        for half in tl.static_range(HALVES):
            sums = tl.zeros([HALF, M], tl.float32)
            for field in tl.static_range(FIELDS):
                sums = tl.dot(_field(codes, half, field, KEYS, NATIVE), scaled[field], sums)
            logits = logits + (sums * (factor * 16777216.0) + shift[None, :],)
    return logits


@triton.jit
def _add_values(acc, shifts, shrink, weights, pool_half, pool_bf16, pool_fp8, start, begin,
                D: tl.constexpr, VALUES: tl.constexpr, HALVES: tl.constexpr,
                NATIVE: tl.constexpr):  # fmt: skip
    """The accumulators, one a part, and what offsets add to a group's, after another step."""
    FIELDS: tl.constexpr = _fields(VALUES)
    CHUNKS: tl.constexpr = _parts(VALUES, D) // FIELDS
    GROUPS: tl.constexpr = _groups(VALUES, D)
    W: tl.constexpr = D // _parts(VALUES, D)
    channel, token = tl.arange(0, W), tl.arange(0, HALF)
    added, moved = (), ()
    if VALUES >= FP8:
        sums = acc[0] * shrink[None, :]
        for half in tl.static_range(HALVES):
            first = begin + half * HALF
            if VALUES == BF16:
                place = (first + token)[None, :] * D + channel[:, None]
                values = tl.load(pool_bf16 + start // 2 + place)
                sums += _product(values, weights[half].to(tl.bfloat16), NATIVE)
            else:
                place = channel[:, None] * PAGE + (first + token)[None, :]
                values = tl.load(pool_fp8 + start + place).to(tl.float16)
                sums = tl.dot(values, weights[half].to(tl.float16), sums)
        added, moved = (sums,), shifts
    else:
        scales = pool_half + (start + _code_bytes(VALUES, D)) // 2 + tl.arange(0, PAGE)
        scaled = ()  # weights times scales by group, then half
        for group in tl.static_range(GROUPS):
            scale = _by_half(tl.load(scales + group * PAGE))
            offset = _by_half(tl.load(scales + (GROUPS + group) * PAGE))
            shift = shifts[group] * shrink[None, :]
            for half in tl.static_range(2):
                shift += weights[half] * offset[half].to(tl.float32)[:, None]
                scaled = scaled + (weights[half].to(tl.float16) * scale[half][:, None],)
            moved = moved + (shift,)
        for chunk in tl.static_range(CHUNKS):
            place = (chunk * W + channel)[:, None] * HALF + token[None, :]
            codes = tl.load(pool_half + start // 2 + place)
            for field in tl.static_range(FIELDS):
                sums = acc[chunk * FIELDS + field] * shrink[None, :]
                for half in tl.static_range(2):
                    values = _field(codes, half, field, VALUES, NATIVE)
                    weight = scaled[2 * _group(chunk * FIELDS + field, VALUES, D) + half]
                    sums = tl.dot(values, weight, sums)
                added = added + (sums,)
    return added, moved


@triton.jit
def _highest(halves, HALVES: tl.constexpr):
    """Of a step's logits, by place in a half page."""
    if HALVES == 2:
        highest = tl.maximum(halves[0], halves[1])
    else:
        highest = halves[0]
    return highest


@triton.jit
def _by_field(vector, W: tl.constexpr, FIELDS: tl.constexpr):
    """A key's channels [W] by field, out of one vector where they lie side by side."""
    if FIELDS == 1:
        parts = (vector,)
    elif FIELDS == 2:
        even, odd = tl.split(tl.reshape(vector, [W, 2]))
        parts = (even, odd)
    else:
        even, odd = tl.split(tl.reshape(vector, [W, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _by_half(vector):
    """Both halves [32] of a page, whose tokens t and t + 32 lie side by side."""
    first, last = tl.split(tl.reshape(vector, [HALF, 2]))
    return first, last


@triton.jit
def _product(left, right, NATIVE: tl.constexpr):
    """Of bf16 tiles; Triton's interpreter multiplies them wrongly, and gets them wider."""
    if NATIVE:
        product = tl.dot(left, right)
    else:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32))
    return product


@triton.jit
def _field(units, HALF_PAGE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr,
           NATIVE: tl.constexpr):  # fmt: skip
    """One field of one half page's bytes as fp16 whose bits it is: 2^(24 - FIELD * BITS) too small.

    Read as a number below the normal ones, a field in the lowest ten bits counts in steps of
    2^-24; tensor cores multiply such numbers exactly, so that a mask is all the unpacking.
    """
    if NATIVE:
        field = tl.inline_asm_elementwise(
            _mask(HALF_PAGE, FIELD, BITS), "=r,r", [units], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        bits = units.to(tl.uint16, bitcast=True) >> (8 * HALF_PAGE)
        field = (bits & (((1 << BITS) - 1) << (FIELD * BITS))).to(tl.float16, bitcast=True)
    return field


@triton.constexpr_function
def _mask(half, field, bits):
    """PTX that masks one field of two units."""
    mask = (((1 << bits) - 1) << (field * bits)) * 0x10001
    if half == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 high; shr.b32 high, $1, 8; and.b32 $0, high, {mask}; }}"


@triton.constexpr_function
def _unit(field, bits):
    """What one step of a field counts, where the field was read as it lies."""
    return 2.0 ** (24 - field * bits)


@triton.constexpr_function
def _halves_a_step(pair):
    """Half pages a step: integers of two halves share a unit."""
    return 1 if min(pair // 32, pair % 32) > 8 else 2


@triton.constexpr_function
def _groups(code, head_dim):
    """Groups of channels that share a value's offset; one, of nothing, for floats."""
    return (head_dim + 63) // 64 if code <= 8 else 1


@triton.constexpr_function
def _group(part, code, head_dim):
    """Of the channels of a part, which go by chunk, then field."""
    fields, width = 8 // code, head_dim // max(8 // code, head_dim // 64)
    return ((part % fields) * (head_dim // fields) + (part // fields) * width) // 64


@triton.constexpr_function
def _fields(code):
    """Channels that share a byte."""
    return 8 // code if code < 8 else 1


@triton.constexpr_function
def _parts(code, head_dim):
    """Accumulators of a format's values: neither two fields nor two groups in one."""
    return 1 if code > 8 else max(8 // code, head_dim // 64)


@triton.constexpr_function
def _code_bytes(code, head_dim):
    """Bytes of a page's codes."""
    return 64 * head_dim * (8 if code == 9 else code) // 8


@triton.jit
def _queries(q, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr):
    """The group's queries [D / fields, M] by field, in the type that keys are multiplied in."""
    W: tl.constexpr = D // _fields(KEYS)
    head, channel = tl.arange(0, M), tl.arange(0, W)
    parts = ()
    for part in tl.static_range(_fields(KEYS)):
        place = head[None, :] * D + part * W + channel[:, None]
        query = tl.load(q + place, mask=head[None, :] < G, other=0)
        parts = parts + (query.to(tl.bfloat16 if KEYS == BF16 else tl.float16),)
    return parts


@triton.jit
def _zeros(M: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([W, M], tl.float32),)
    return parts


@triton.jit
def _merge(scratch, scratch_lse, count, out, row_lse,
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


@triton.constexpr_function
def _scale_bytes(code, head_dim):
    """Bytes of a page's key scales."""
    return 4 * head_dim if code <= 8 else 0
