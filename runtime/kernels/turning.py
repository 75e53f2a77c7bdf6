"""Hadamard rotations inside kernels: of a group's queries, and of its outputs back.

The matrix of D channels is a Kronecker product: tensor cores multiply blocks of at most 32 channels
by one small matrix, whose signs are a few registers, and blocks are then added and subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtune.runtime.kernels.codes import first_channel, has_random_signs


@triton.constexpr_function
def block_of(width):
    """Channels of a block: a part's, of which there may be two."""
    return min(width, 32)


@triton.constexpr_function
def is_odd(number):
    """Whether an odd number of bits is set."""
    return bin(number).count("1") % 2 == 1


@triton.jit
def negative_where_odd(shared):
    """1, or -1 where of the lowest eight bits an odd number is set, fp16: as its bits lie."""
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return (0x3C00 | ((shared & 1) << 15)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def signs(row, column):
    """Signs [R, C] fp16 of a Hadamard matrix, of 32 columns or rows at most."""
    return negative_where_odd(row[:, None] & column[None, :] & 31)


@triton.jit
def mixed(blocks, COUNT: tl.constexpr):
    """Sums of blocks by the signs of a Hadamard matrix of COUNT rows, a power of two."""
    found = ()
    for row in tl.static_range(COUNT):
        total = blocks[0]
        for column in tl.static_range(1, COUNT):
            if is_odd(row & column):
                total = total - blocks[column]
            else:
                total = total + blocks[column]
        found = found + (total,)
    return found


@triton.jit
def turned_queries(q, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                   KEYS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The group's queries times a Hadamard matrix, by part [D / PARTS, M] float32."""
    W: tl.constexpr = D // PARTS
    BLOCK: tl.constexpr = block_of(W)
    SHARE: tl.constexpr = W // BLOCK
    head, channel = tl.arange(0, M)[None, :], tl.arange(0, BLOCK)
    matrix = signs(channel, channel)
    loaded, blocks = (), ()
    for block in tl.static_range(PARTS * SHARE):  # all on their way before one is waited for
        first = first_channel(block // SHARE, KEYS, D) + block % SHARE * BLOCK
        place = head * D + (first + channel)[:, None]
        loaded = loaded + (tl.load(q + place, mask=head < G, other=0),)
    for block in tl.static_range(PARTS * SHARE):
        query = loaded[block]
        if has_random_signs(KEYS):
            mine = _random_signs(
                first_channel(block // SHARE, KEYS, D) + block % SHARE * BLOCK, BLOCK, D
            )
            query = query * mine[:, None].to(query.dtype)
        blocks = blocks + (tl.dot(matrix, query.to(tl.float16)) * (D**-0.5),)
    blocks = mixed(blocks, PARTS * SHARE)
    parts = ()
    for part in tl.static_range(PARTS):
        if SHARE == 2:
            both = tl.join(blocks[2 * part], blocks[2 * part + 1])
            parts = parts + (tl.reshape(tl.permute(both, 2, 0, 1), [W, M]),)
        else:
            parts = parts + (blocks[part],)
    return parts


@triton.jit
def store_turned(scratch, outputs, D: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
                 VALUES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Outputs by part, rotated back; each as two numbers of fp16, that nothing be lost to it."""
    W: tl.constexpr = D // PARTS
    BLOCK: tl.constexpr = block_of(W)
    SHARE: tl.constexpr = W // BLOCK
    head, channel = tl.arange(0, M)[None, :], tl.arange(0, BLOCK)
    matrix = signs(channel, channel)
    blocks = ()
    for part in tl.static_range(PARTS):
        output = outputs[part] * (D**-0.5)
        if SHARE == 2:
            halves = tl.split(tl.permute(tl.reshape(output, [2, BLOCK, M]), 1, 2, 0))
            blocks = blocks + (halves[0], halves[1])
        else:
            blocks = blocks + (output,)
    blocks = mixed(blocks, PARTS * SHARE)
    for block in tl.static_range(PARTS * SHARE):
        first = first_channel(block // SHARE, VALUES, D) + block % SHARE * BLOCK
        coarse = blocks[block].to(tl.float16)
        rest = (blocks[block] - coarse.to(tl.float32)).to(tl.float16)
        sums = tl.dot(matrix, rest, tl.dot(matrix, coarse))
        if has_random_signs(VALUES):
            mine = _random_signs(
                first_channel(block // SHARE, VALUES, D) + block % SHARE * BLOCK, BLOCK, D
            )
            sums = sums * mine[:, None]
        place = head * D + (first + channel)[:, None]
        tl.store(scratch + place, sums, mask=head < G)


@triton.jit
def _random_signs(FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr):
    """Signs of some channels as they are drawn before the rotation, [COUNT] float32."""
    channel = tl.arange(0, COUNT)
    low, high = _sign_bits(FIRST, D), _sign_bits(FIRST + 16, D)
    flags = tl.where(channel < 16, low >> (channel & 15), high >> (channel & 15))
    return 1.0 - 2.0 * (flags & 1).to(tl.float32)


@triton.constexpr_function
def _sign_bits(first, head_dim):
    """A bit for each of 16 channels, set where its sign is negative; none beyond the head."""
    from kvtune.policies.blocks import signs as drawn

    some = drawn(head_dim)[first : first + 16].tolist()
    return sum(1 << n for n, sign in enumerate(some) if sign < 0)
