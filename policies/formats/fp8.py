"""8-bit floating point, e4m3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Format, Role

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

    def footprint(self, tokens: int, head_dim: int, role: Role) -> int:
        """One byte an element and the scale."""
        return tokens * head_dim + (_SCALE_BYTES if tokens else 0)

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Scale, cast to e4m3, cast back."""
        import torch

        if tensor.numel() == 0:
            return tensor
        real = torch.arange(tensor.shape[-2], device=tensor.device) < counts[..., None]
        largest = tensor.abs().masked_fill(~real[..., None], 0).amax((-1, -2), keepdim=True)
        scale = largest.float().clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST_E4M3
        codes = (tensor.float() / scale).clamp(-_LARGEST_E4M3, _LARGEST_E4M3)
        return (codes.to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)
