"""The Hadamard rotation: outlying channels are spread over all, and one scale then fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def block_of(head_dim: int) -> int:
    """Channels that are rotated among themselves: the largest power of two that divides D."""
    return head_dim & -head_dim


def hadamard(rows: Tensor) -> Tensor:
    """``[..., D]`` float32 times the orthonormal Hadamard matrix, which is its own inverse.

    Fast Walsh-Hadamard transform in Sylvester's order: log2(D) sums and differences. Where D is no
    power of two, equal blocks of channels are rotated, each in itself.
    """
    import torch

    block = block_of(rows.shape[-1])
    found, left = rows.unflatten(-1, (-1, block)), block
    while left > 1:
        even, odd = found[..., 0::2], found[..., 1::2]
        found, left = torch.cat([even + odd, even - odd], -1), left // 2
    rotated: Tensor = found.flatten(-2) * block**-0.5
    return rotated
