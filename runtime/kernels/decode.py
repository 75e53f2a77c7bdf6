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
BF16 = tl.constexpr(16)
FP8 = tl.constexpr(9)
TILE_FIELDS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(6.0)  # weights are 2^6 times too large, which keeps small ones normal in fp16


@triton.jit
def decode_attention(
    q, out, row_lse, logits_out,
    pool_bytes, pool_half, pool_bf16, pool_fp8,
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
        pool_*: the pool's memory, as four types.
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
                pool_bytes, pool_half, pool_bf16, pool_fp8,
                table, at, cell, tokens, fp8_scales + 2 * segment, softmax_scale,
                D, G, M, PAIRS[n] // 32, PAIRS[n] % 32, STAGES, NATIVE, EXPORT,
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
    pool_bytes, pool_half, pool_bf16, pool_fp8,
    table, at, cell, tokens, fp8_scales, softmax_scale,
    D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr, EXPORT: tl.constexpr,
):  # fmt: skip
    """Attend to ``tokens`` tokens whose pages begin at table entry ``at``."""
    PARTS: tl.constexpr = _parts(VALUES, D)
    W: tl.constexpr = D // PARTS
    VALUES_AT: tl.constexpr = _code_bytes(KEYS, D) + _scale_bytes(KEYS, D)
    head, token = tl.arange(0, M), tl.arange(0, PAGE)
    factor = softmax_scale * LOG2_E
    value_scale = 1.0
    if KEYS == FP8:
        factor *= tl.load(fp8_scales)
    if VALUES == FP8:
        value_scale = tl.load(fp8_scales + 1)
    queries = _queries(q, D, G, M, KEYS)
    acc = _zeros(M, W, PARTS)
    total = tl.zeros([M], tl.float32)
    largest = tl.full([M], -1e30, tl.float32)
    cell = tl.load(table + at, mask=cell < 0, other=cell)
    for page in tl.range(0, tl.cdiv(tokens, PAGE), num_stages=STAGES):
        start = cell.to(tl.int64) * (4 * D)
        cell = tl.load(table + at + page + 1)  # the next one, long before it is needed
        logits = _logits(queries, pool_bytes, pool_half, pool_bf16, pool_fp8, start,
                         D, KEYS, NATIVE) * factor  # fmt: skip
        if EXPORT:
            place = token + (at + page) * PAGE
            tl.store(logits_out + head[None, :] * EXPORT + place[:, None], logits / LOG2_E,
                     mask=head[None, :] < G)  # fmt: skip
        logits = tl.where((token + page * PAGE < tokens)[:, None], logits, -float("inf"))
        peak = tl.maximum(largest, tl.max(logits, 0))
        weights = tl.exp2(logits - (peak - LIFT)[None, :])
        shrink = tl.exp2(largest - peak)
        largest = peak
        total = total * shrink + tl.sum(weights, 0)
        acc = _add_values(acc, shrink, weights, pool_bytes, pool_half, pool_bf16, pool_fp8,
                          start + VALUES_AT, D, VALUES, NATIVE)  # fmt: skip
    share = value_scale / tl.maximum(total, 1e-30)
    FIELDS: tl.constexpr = _fields(VALUES)
    channel = tl.arange(0, W)
    for part in tl.static_range(PARTS):
        column = (part % FIELDS) * (D // FIELDS) + (part // FIELDS) * W + channel
        tl.store(scratch + head[None, :] * D + column[:, None],
                 acc[part] * share[None, :], mask=head[None, :] < G)  # fmt: skip
    lse = tl.where(total > 0, (largest - LIFT + tl.log2(total)) / LOG2_E, -float("inf"))
    tl.store(scratch_lse + head, lse, mask=head < G)


@triton.jit
def _logits(queries, pool_bytes, pool_half, pool_bf16, pool_fp8, start,
            D: tl.constexpr, KEYS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Unscaled logits [64, M] of one page."""
    PARTS: tl.constexpr = _fields(KEYS)
    W: tl.constexpr = D // PARTS
    channel, token = tl.arange(0, W), tl.arange(0, PAGE)
    place = token[:, None] * W + channel[None, :]
    if KEYS == BF16:
        logits = _product(tl.load(pool_bf16 + start // 2 + place), queries[0], NATIVE)
    elif KEYS == FP8:
        logits = tl.dot(tl.load(pool_fp8 + start + place).to(tl.float16), queries[0])
    else:
        codes = tl.load(pool_bytes + start + place)
        every = pool_half + (start + _code_bytes(KEYS, D)) // 2 + tl.arange(0, D)
        scales, offsets = _halves(tl.load(every), W, PARTS), _halves(tl.load(every + D), W, PARTS)
        logits = tl.zeros([PAGE, queries[0].shape[1]], tl.float32)
        for part in tl.static_range(PARTS):
            keys = (
                _field(codes, part, KEYS, NATIVE) * scales[part][None, :] + offsets[part][None, :]
            )
            logits = tl.dot(keys, queries[part], logits)
    return logits


@triton.jit
def _add_values(acc, shrink, weights, pool_bytes, pool_half, pool_bf16, pool_fp8, start,
                D: tl.constexpr, VALUES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """The accumulators, one a part, after another page of values."""
    FIELDS: tl.constexpr = _fields(VALUES)
    CHUNKS: tl.constexpr = _parts(VALUES, D) // FIELDS
    W: tl.constexpr = D // _parts(VALUES, D)
    channel, token = tl.arange(0, W), tl.arange(0, PAGE)
    place = channel[:, None] * PAGE + token[None, :]
    scales = pool_half + (start + _code_bytes(VALUES, D)) // 2 + token
    OFFSETS: tl.constexpr = PAGE * ((D + PAGE - 1) // PAGE)
    added = ()
    if VALUES == BF16:
        values = tl.load(pool_bf16 + start // 2 + token[None, :] * D + channel[:, None])
        added = (acc[0] * shrink[None, :] + _product(values, weights.to(tl.bfloat16), NATIVE),)
    elif VALUES == FP8:
        values = tl.load(pool_fp8 + start + place).to(tl.float16)
        added = (tl.dot(values, weights.to(tl.float16), acc[0] * shrink[None, :]),)
    else:
        for chunk in tl.static_range(CHUNKS):
            codes = tl.load(pool_bytes + start + place + chunk * W * PAGE)
            for field in tl.static_range(FIELDS):
                group = (field * (D // FIELDS) + chunk * W) // PAGE
                scale = tl.load(scales + group * PAGE)
                offset = tl.load(scales + OFFSETS + group * PAGE)
                values = _field(codes, field, VALUES, NATIVE) * scale[None, :] + offset[None, :]
                before = acc[chunk * FIELDS + field] * shrink[None, :]
                added = added + (tl.dot(values, weights.to(tl.float16), before),)
    return added


@triton.jit
def _halves(vector, W: tl.constexpr, PARTS: tl.constexpr):
    """A vector's parts of W; loaded as one, for only loads of four bytes a lane run ahead."""
    if PARTS == 1:
        parts = (vector,)
    elif PARTS == 2:
        first, last = tl.split(tl.trans(tl.reshape(vector, [2, W])))
        parts = (first, last)
    else:
        first, last = tl.split(tl.trans(tl.reshape(vector, [2, 2 * W])))
        parts = _halves(first, W, 2) + _halves(last, W, 2)
    return parts


@triton.jit
def _product(left, right, NATIVE: tl.constexpr):
    """Of bf16 tiles; Triton's interpreter multiplies them wrongly, and gets them wider."""
    if NATIVE:
        product = tl.dot(left, right)
    else:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32))
    return product


@triton.jit
def _field(codes, FIELD: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """One field of every byte, as fp16; exact."""
    if NATIVE:
        field = tl.inline_asm_elementwise(
            _unpack(FIELD, BITS), "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        field = ((codes >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.float16)
    return field


@triton.constexpr_function
def _unpack(field, bits):
    """PTX that takes one field of four bytes to four fp16, exactly, without shifting.

    In fp16, bits s upwards of the significand of 2^(10 - s) count ones: or the field in where it
    is, and subtract 2^(10 - s).
    """
    base = (0x6400 - 0x400 * field * bits) * 0x10001
    mask = (((1 << bits) - 1) << (field * bits)) * 0x10001
    return f"""{{
        .reg .b32 low, high, base;
        mov.b32 base, {base};
        prmt.b32 low, $2, 0, 0x4140;
        prmt.b32 high, $2, 0, 0x4342;
        lop3.b32 low, low, {mask}, base, 0xea;
        lop3.b32 high, high, {mask}, base, 0xea;
        sub.f16x2 $0, low, base;
        sub.f16x2 $1, high, base;
    }}"""


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
