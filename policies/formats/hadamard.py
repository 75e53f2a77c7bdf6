"""The Hadamard rotation: outlying channels are spread over all, and one scale then fits them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype


def block_of(head_dim: int) -> int:
    """Channels that are rotated among themselves: the largest power of two that divides D."""
    return head_dim & -head_dim


def hadamard(rows: Tensor) -> Tensor:
    """``[..., D]`` float32 times the orthonormal Hadamard matrix, which is its own inverse.

    In Sylvester's order. Where D is no power of two, equal blocks of channels are rotated, each in
    itself. On a CPU it is one product with the matrix, which takes a sixth of the time of the
    transform's passes over memory; on a GPU the fast Walsh-Hadamard transform, log2(D) sums and
    differences, whose results do not depend on how many rows there are.
    """
    if rows.device.type == "cpu":
        return _product(rows)
    return _transformed(rows)


def _product(rows: Tensor) -> Tensor:
    block = block_of(rows.shape[-1])
    return (rows.reshape(-1, block) @ _matrix(block, rows.dtype)).view(rows.shape)


@cache
def _matrix(block: int, dtype: dtype) -> Tensor:
    """``[block, block]`` on the CPU."""
    import torch

    with torch.inference_mode(False):  # kept, so that it must not depend on who asks first
        return _transformed(torch.eye(block, dtype=dtype))


def _transformed(rows: Tensor) -> Tensor:
    import torch

    block = block_of(rows.shape[-1])
    found, left = rows.unflatten(-1, (-1, block)), block
    while left > 1:
        even, odd = found[..., 0::2], found[..., 1::2]
        found, left = torch.cat([even + odd, even - odd], -1), left // 2
    rotated: Tensor = found.flatten(-2) * block**-0.5
    return rotated
