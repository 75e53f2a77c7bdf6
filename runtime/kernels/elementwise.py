"""What surrounds attention and matrix products in a decode step, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, more, total, weight, out, width, eps, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
              ADD: tl.constexpr):  # fmt: skip
    """Normalise a row; SHIFTED: weights are stored less one, and multiply before rounding.

    ADD: the row is ``x + more``, which is rounded and left in ``total`` first.
    """
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = tl.program_id(0).to(tl.int64) * width
    values = tl.load(x + row + at, mask=inside, other=0).to(tl.float32)
    if ADD:
        values += tl.load(more + row + at, mask=inside, other=0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(total + row + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    if SHIFTED:
        result = values * (1 + scale.to(tl.float32))
    else:
        result = values.to(x.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row + at, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, shifted: bool) -> Tensor:
    """Root-mean-square norm over the last axis, as Llama's (or Gemma's, shifted)."""
    return _normalised(x.contiguous(), None, weight, eps, shifted)[1]


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + more``, and Llama's norm of it."""
    return _normalised(x.contiguous(), more.contiguous(), weight, eps, False)


def _normalised(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    """The row's sum (``x`` where nothing is added) and its norm."""
    out, width = torch.empty_like(x), x.shape[-1]
    total = x if more is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    _rms_norm[(x.numel() // width,)](
        x, x if more is None else more, total, weight, out, width, eps, block, shifted,
        more is not None, num_warps=warps,
    )  # fmt: skip
    return total, out


@triton.jit
def _gated(gate, up, out, width, gate_stride, up_stride, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0).to(tl.float32)
    if TANH:
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # gelu by tanh
    else:
        g = g * tl.sigmoid(g)
    result = g.to(gate.dtype.element_ty).to(tl.float32) * u
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """``silu(gate) * up``, or gelu by its tanh approximation; rows may be strided."""
    width, rows = gate.shape[-1], gate.numel() // gate.shape[-1]
    gates, ups = gate.reshape(rows, width), up.reshape(rows, width)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid = (rows, triton.cdiv(width, 1024))
    _gated[grid](gates, ups, out, width, gates.stride(0), ups.stride(0), tanh, 1024)
    return out


@triton.jit
def _rotate(q, k, cos, sin, q_out, k_out, q_strides, k_strides, angle_stride, HQ, H,
            D: tl.constexpr):  # fmt: skip
    """One head of one sequence, query or key."""
    row, head = tl.program_id(0), tl.program_id(1)
    if head < HQ:
        source = q + row * q_strides[0] + head * q_strides[1]
        target = q_out + (row * HQ + head) * D
    else:
        source = k + row * k_strides[0] + (head - HQ) * k_strides[1]
        target = k_out + (row * H + head - HQ) * D
    angles = row * angle_stride
    half = tl.arange(0, D // 2)
    first, second = rotated_halves(source, cos + angles, sin + angles, half, D)
    tl.store(target + half, first)
    tl.store(target + half + D // 2, second)


@triton.jit
def rotated_halves(source, cos, sin, half, D: tl.constexpr):
    """Both halves of the head at ``source``, ``half`` being channels [D / 2].

    Of several heads if ``source`` is [n, 1] and ``half`` [n, D / 2]: so angles are read to where
    they are used.
    """
    other = half + D // 2
    first, second = tl.load(source + half).to(tl.float32), tl.load(source + other).to(tl.float32)
    c, s = tl.load(cos + half).to(tl.float32), tl.load(sin + half).to(tl.float32)
    rotated_first = first * c - second * s
    c, s = tl.load(cos + other).to(tl.float32), tl.load(sin + other).to(tl.float32)
    rotated_second = second * c + first * s
    dtype = source.dtype.element_ty
    return rotated_first.to(dtype), rotated_second.to(dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of one token a sequence; q ``[B, Hq, 1, D]``, cos ``[B or 1, 1, D]``."""
    batch, heads, _, head_dim = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    stride = cos.stride(0) if len(cos) > 1 else 0
    _rotate[(batch, heads + k.shape[1])](
        q, k, cos, sin, q_out, k_out, q.stride()[:2], k.stride()[:2], stride, heads, k.shape[1],
        head_dim, num_warps=1,
    )  # fmt: skip
    return q_out, k_out
