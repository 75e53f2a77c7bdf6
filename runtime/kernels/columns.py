"""What each prompt key drew over all queries, without the N x N matrix.

Two passes of flash attention's kind: the log-sum-exp of every query, then, key block by key block,
the sum of exp(logit - lse) over the queries that see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtune.runtime.kernels.launch import is_native


@triton.jit
def _query_lse(q, k, lse, stride_q, stride_k, tokens, scale, G,
               D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Log-sum-exp of BLOCK queries of one query head."""
    head, start = tl.program_id(1), tl.program_id(0) * BLOCK
    row, column, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, D)
    at = start + row
    queries = tl.load(q + head.to(tl.int64) * stride_q + at[:, None] * D + channel[None, :],
                      mask=(at < tokens)[:, None], other=0)  # fmt: skip
    keys = k + (head // G).to(tl.int64) * stride_k + column[None, :] * D + channel[:, None]
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, start + BLOCK, BLOCK):
        block = tl.load(keys + first * D, mask=(column + first < tokens)[None, :], other=0)
        logits = _logits(queries, block, scale, WIDE)
        logits = tl.where((column + first)[None, :] <= at[:, None], logits, -float("inf"))
        peak = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - peak) + tl.sum(tl.exp(logits - peak[:, None]), 1)
        largest = peak
    tl.store(lse + head * tokens + at, largest + tl.log(total), mask=at < tokens)


@triton.jit
def _column_sums(q, k, lse, sums, stride_q, stride_k, tokens, scale, G,
                 D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Attention drawn by BLOCK keys from one query head."""
    head, start = tl.program_id(1), tl.program_id(0) * BLOCK
    row, column, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, D)
    at = start + column
    keys = tl.load(k + (head // G).to(tl.int64) * stride_k + at[None, :] * D + channel[:, None],
                   mask=(at < tokens)[None, :], other=0)  # fmt: skip
    queries = q + head.to(tl.int64) * stride_q + row[:, None] * D + channel[None, :]
    drawn = tl.zeros([BLOCK], tl.float32)
    for first in range(start, tokens, BLOCK):
        inside = row + first < tokens
        block = tl.load(queries + first * D, mask=inside[:, None], other=0)
        known = tl.load(lse + head * tokens + first + row, mask=inside, other=float("inf"))
        logits = _logits(block, keys, scale, WIDE)
        weights = tl.exp(logits - known[:, None])
        drawn += tl.sum(tl.where(at[None, :] <= (row + first)[:, None], weights, 0.0), 0)
    tl.store(sums + head * tokens + at, drawn, mask=at < tokens)


@triton.jit
def _logits(queries, keys, scale, WIDE: tl.constexpr):
    """WIDE: in float32, for Triton's interpreter, which multiplies bf16 wrongly."""
    if WIDE:
        logits = tl.dot(queries.to(tl.float32), keys.to(tl.float32))
    else:
        logits = tl.dot(queries, keys)
    return logits * scale


def column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Each key's attention summed over all causal prompt queries, ``[Hq, P]`` float32.

    Args:
        q: ``[Hq, P, D]`` after RoPE, a head contiguous.
        k: ``[H, P, D]`` likewise.
        scale: multiplies the logits.
    """
    heads, tokens, head_dim = q.shape
    lse = torch.empty(heads, tokens, device=q.device)
    sums = torch.empty_like(lse)
    block = 64
    grid = (triton.cdiv(tokens, block), heads)
    group = heads // len(k)
    common = (q.stride(0), k.stride(0), tokens, scale, group, head_dim, block, not is_native())
    _query_lse[grid](q, k, lse, *common)
    _column_sums[grid](q, k, lse, sums, *common)
    return sums
