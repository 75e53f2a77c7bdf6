"""8-bit floating point, e4m3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Format, Role, Stored

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_E4M3 = 448.0
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Fp8(Format):
    """Cast to e4m3 with one float32 scale a head and tensor, the largest magnitude over 448.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; scaling as
    serving engines do for their fp8 KV caches, but per head.
    """

    name = "fp8"
    source = "Micikevicius et al., arXiv 2209.05433"
    bits = 8

    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """One byte an element and the scale."""
        return tokens * head_dim + (_SCALE_BYTES if tokens else 0)

    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """One byte an element, and one scale."""
        scale = _scale(tensor.abs().amax() if len(tensor) else tensor.new_zeros(()))
        codes = _codes(tensor, scale)
        return Stored({"codes": codes, "scale": scale[None][: len(tensor)]}, len(tensor))

    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """Cast back and scale."""
        return stored.buffers["codes"].float() * stored.buffers["scale"].float().sum()

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Scale, cast to e4m3, cast back."""
        import torch

        if tensor.numel() == 0:
            return tensor
        real = torch.arange(tensor.shape[-2], device=tensor.device) < counts[..., None]
        magnitudes = tensor.abs().masked_fill(~real[..., None], 0)
        scale = _scale(magnitudes.amax((-1, -2), keepdim=True))
        return (_codes(tensor, scale).float() * scale).to(tensor.dtype)


def _scale(largest: Tensor) -> Tensor:
    """The largest magnitude over that of e4m3, float32."""
    import torch

    return largest.float().clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST_E4M3


def _codes(tensor: Tensor, scale: Tensor) -> Tensor:
    import torch

    scaled = (tensor.float() / scale).clamp(-_LARGEST_E4M3, _LARGEST_E4M3)
    return scaled.to(torch.float8_e4m3fn)
