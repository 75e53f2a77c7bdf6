"""Floating point of 4 and 8 bits in blocks of a token's channels: MXFP4, MXFP8 and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.blocks import E2M1, Blocks, power_of_two
from kvtune.policies.formats.blocked import BlockCodes, BlockFormat, padded_blocks

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_E2M1, _LARGEST_E4M3 = 6.0, 448.0


@dataclass(frozen=True)
class MxFp4(BlockFormat):
    """e2m1 numbers, 32 of which share a power of two.

    scale = 2^(floor(log2(largest magnitude)) - 2), one byte; code = nearest of e2m1 to x / scale

    Source: "OCP Microscaling Formats (MX) Specification", version 1.0, 2023. A last short block is
    filled up with zeros.
    """

    name = "mxfp4"
    source = "OCP Microscaling Formats specification 1.0"
    bits = 4

    @property
    def blocks(self) -> Blocks:
        """32 channels, e2m1 and a power of two."""
        return Blocks("e2m1", 4, 32, "power")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Exponents and codes of e2m1."""
        blocks, biased = _with_exponents(rows, 2)
        return BlockCodes(_e2m1(blocks / power_of_two(biased)[..., None]), _as_bytes(biased))


@dataclass(frozen=True)
class MxFp8(BlockFormat):
    """e4m3 numbers, 32 of which share a power of two.

    scale = 2^(floor(log2(largest magnitude)) - 8), one byte; code = nearest of e4m3 to x / scale

    Source: as ``mxfp4``. What lies beyond e4m3's largest number, 448, takes that.
    """

    name = "mxfp8"
    source = "OCP Microscaling Formats specification 1.0"
    bits = 8

    @property
    def blocks(self) -> Blocks:
        """32 channels, e4m3 and a power of two."""
        return Blocks("e4m3", 8, 32, "power")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Exponents and codes of e4m3."""
        blocks, biased = _with_exponents(rows, 8)
        return BlockCodes(e4m3(blocks / power_of_two(biased)[..., None]), _as_bytes(biased))


@dataclass(frozen=True)
class NvFp4(BlockFormat):
    """e2m1 numbers, 16 of which share an e4m3 scale; a head's scales share one of 32 bits.

    head = largest magnitude / (6 * 448); scale = largest of a block / 6 / head, in e4m3

    Source: NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025;
    there the outer scale is a tensor's, here a head's. A last short block is filled with zeros.
    """

    name = "nvfp4"
    source = "NVIDIA, Introducing NVFP4, 2025"
    bits = 4

    @property
    def blocks(self) -> Blocks:
        """16 channels, e2m1 and an e4m3 scale."""
        return Blocks("e2m1", 4, 16, "e4m3")

    def code_bytes(self, tokens: int, head_dim: int, role: str) -> int:
        """Whole blocks, and the head's scale."""
        return super().code_bytes(tokens, head_dim, role) + 4  # type: ignore[arg-type]

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Scales in e4m3 and codes of e2m1."""
        import torch

        blocks = padded_blocks(rows, 16)
        largest = blocks.abs().amax(-1)
        if head is None:
            top = largest.amax((-1, -2), keepdim=True).clamp_min(1e-30)
            head = top / _LARGEST_E4M3 / _LARGEST_E2M1
        scale = (largest / _LARGEST_E2M1 / head).clamp_max(_LARGEST_E4M3).to(torch.float8_e4m3fn)
        step = scale.float() * head
        codes = _e2m1(blocks / torch.where(step > 0, step, 1.0)[..., None])
        return BlockCodes(codes, (scale,), head)


def e4m3(scaled: Tensor) -> Tensor:
    """Codes of the nearest e4m3 numbers, the last two axes as one, uint8."""
    import torch

    near = scaled.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return near.view(torch.uint8).flatten(-2)


def _with_exponents(rows: Tensor, largest_power: int) -> tuple[Tensor, Tensor]:
    """Blocks of 32, and by how much 127 exceeds the power of each one's scale."""
    import torch

    blocks = padded_blocks(rows, 32)
    largest = blocks.abs().amax(-1)
    exponent = torch.frexp(largest).exponent - 1 - largest_power
    return blocks, torch.where(largest > 0, exponent + 127, 0).clamp(0, 254)


def _as_bytes(biased: Tensor) -> tuple[Tensor]:
    import torch

    return (biased.to(torch.uint8),)


def _e2m1(scaled: Tensor) -> Tensor:
    """Codes of the nearest e2m1 numbers, ties to the even code; the sign is the highest bit."""
    import torch

    magnitudes = torch.tensor(E2M1, device=scaled.device)
    size = scaled.abs().clamp_max(_LARGEST_E2M1)
    above = torch.bucketize(size, magnitudes).clamp(1, 7)
    low, high = size - magnitudes[above - 1], magnitudes[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    codes = torch.where(up, above, above - 1)
    return (codes + 8 * (scaled < 0)).to(torch.uint8).flatten(-2)
