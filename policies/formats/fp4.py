"""4-bit floating point in blocks of a token's channels: MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_E2M1, _LARGEST_E4M3 = 6.0, 448.0


@dataclass(frozen=True)
class MxFp4(Coded):
    """e2m1 numbers, 32 of which share a power of two.

    scale = 2^(floor(log2(largest magnitude)) - 2), one byte; code = nearest of e2m1 to x / scale

    Source: "OCP Microscaling Formats (MX) Specification", version 1.0, 2023. A last short block is
    filled up with zeros.
    """

    name = "mxfp4"
    source = "OCP Microscaling Formats specification 1.0"
    bits = 4

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Half a byte a number and a byte a block, of whole blocks."""
        return tokens * -(-head_dim // 32) * 17

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Exponents and packed codes."""
        import torch

        blocks = _blocks(rows, 32)
        largest = blocks.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(largest).exponent - 3  # of the largest, as a power: one less
        biased = torch.where(largest > 0, exponent + 127, 0).clamp(0, 254)
        return {"codes": _packed(blocks / _power(biased)), "exponents": biased.to(torch.uint8)}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """e2m1 times a power of two."""
        blocks = _read(buffers["codes"], 32) * _power(buffers["exponents"].int())
        return blocks.flatten(-2)[:, : shape[1]]


@dataclass(frozen=True)
class NvFp4(Coded):
    """e2m1 numbers, 16 of which share an e4m3 scale; a head's scales share one of 32 bits.

    head = largest magnitude / (6 * 448); scale = largest of a block / 6 / head, in e4m3

    Source: NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025;
    there the outer scale is a tensor's, here a head's. A last short block is filled with zeros.
    """

    name = "nvfp4"
    source = "NVIDIA, Introducing NVFP4, 2025"
    bits = 4

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Half a byte a number and a byte a block of whole blocks, and the head's scale."""
        return tokens * -(-head_dim // 16) * 9 + 4

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The packed codes, the blocks' scales and the tensor's scale."""
        import torch

        blocks = _blocks(rows, 16)
        largest = blocks.abs().amax(-1, keepdim=True)
        head = largest.amax().clamp_min(1e-30) / (_LARGEST_E2M1 * _LARGEST_E4M3)
        scale = (largest / _LARGEST_E2M1 / head).clamp_max(_LARGEST_E4M3).to(torch.float8_e4m3fn)
        step = scale.float() * head
        codes = _packed(blocks / torch.where(step > 0, step, 1.0))
        return {"codes": codes, "scales": scale, "head": head[None]}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """e2m1 times both scales."""
        blocks = _read(buffers["codes"], 16) * (buffers["scales"].float() * buffers["head"])
        return blocks.flatten(-2)[:, : shape[1]]


def _blocks(rows: Tensor, size: int) -> Tensor:
    import torch.nn.functional as F

    blocks: Tensor = F.pad(rows, (0, -rows.shape[1] % size)).unflatten(-1, (-1, size))
    return blocks


def _power(biased: Tensor) -> Tensor:
    import torch

    return torch.ldexp(torch.ones(biased.shape, device=biased.device), biased - 127)


def _packed(scaled: Tensor) -> Tensor:
    """Codes of the nearest e2m1 numbers, ties to the even code; the sign is the highest bit."""
    import torch

    magnitudes = torch.tensor(_MAGNITUDES, device=scaled.device)
    size = scaled.abs().clamp_max(_LARGEST_E2M1)
    above = torch.bucketize(size, magnitudes).clamp(1, 7)
    low, high = size - magnitudes[above - 1], magnitudes[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    codes = torch.where(up, above, above - 1)
    return pack(codes + 8 * (scaled < 0), 4)


def _read(packed: Tensor, size: int) -> Tensor:
    import torch

    codes = unpack(packed, 4, size)
    magnitudes = torch.tensor(_MAGNITUDES, device=packed.device)[codes & 7]
    signed: Tensor = torch.where(codes >= 8, -magnitudes, magnitudes)
    return signed
