"""Codes of few bits side by side in bytes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """``[..., n]`` codes as ``[..., ceil(n * bits / 8)]`` bytes, the lowest bits first.

    Args:
        codes: integers below ``2 ** bits``.
        bits: 1 to 8 of each code.
    """
    import torch
    import torch.nn.functional as F

    place = torch.arange(bits, device=codes.device)
    flags = ((codes.long()[..., None] >> place) & 1).flatten(-2)  # [..., n * bits]
    whole = F.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (whole << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of ``pack``, ``[..., count]`` int64."""
    import torch

    flags = (packed.long()[..., None] >> torch.arange(8, device=packed.device)) & 1
    whole = flags.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    codes: Tensor = (whole << torch.arange(bits, device=packed.device)).sum(-1)
    return codes
