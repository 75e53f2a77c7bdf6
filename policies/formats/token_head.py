"""8 and 4 bits with one scale a token and head, as serving engines store them, or with none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.blocks import Blocks, signs
from kvtune.policies.formats.blocked import BlockCodes, BlockFormat
from kvtune.policies.formats.fp4 import e4m3
from kvtune.policies.formats.hadamard import block_of, hadamard

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Int8TokenHead(BlockFormat):
    """Symmetric integers: the largest magnitude of a token's head is 127; scales are float32.

    Source: vLLM's ``int8_per_token_head`` cache (Apache-2.0). Codes are 128 larger here.
    """

    name = "int8_token_head"
    source = "vLLM, int8_per_token_head"
    bits = 8

    @property
    def blocks(self) -> Blocks:
        """A token's head, bytes and 32 bits."""
        return Blocks("integers", 8, 0, "single")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Rounded to the nearest."""
        import torch

        scales = rows.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 127
        return BlockCodes(((rows / scales).round() + 128).to(torch.uint8), (scales,))


@dataclass(frozen=True)
class Fp8TokenHead(BlockFormat):
    """e4m3 numbers: the largest magnitude of a token's head is 448; scales are float32.

    Source: vLLM's ``fp8_per_token_head`` cache (Apache-2.0); SGLang keeps one scale a tensor, which
    is ``fp8`` but for the head.
    """

    name = "fp8_token_head"
    source = "vLLM, fp8_per_token_head"
    bits = 8

    @property
    def blocks(self) -> Blocks:
        """A token's head, e4m3 and 32 bits."""
        return Blocks("e4m3", 8, 0, "single")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """The scaled rows cast to e4m3, and their scales."""
        scales = rows.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 448
        return BlockCodes(e4m3((rows / scales)[..., None, :]), (scales,))


@dataclass(frozen=True)
class Fp8Unscaled(BlockFormat):
    """e4m3 numbers as they are: what lies beyond 448 takes that.

    Source: vLLM's ``fp8`` cache (Apache-2.0) where no scales were calibrated, which are then 1.
    """

    name = "fp8_unscaled"
    source = "vLLM, fp8 with scales of 1"
    bits = 8
    keeps_constants = False  # an element has three bits behind its first

    @property
    def blocks(self) -> Blocks:
        """e4m3 alone."""
        return Blocks("e4m3", 8, 0, "none")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """The rows cast to e4m3."""
        return BlockCodes(e4m3(rows[..., None, :]), ())


_LEAST_SCALE = 1e-6
_ZERO_POINT = 15  # of a scale's mantissa, whose last four bits hold it


@dataclass(frozen=True)
class Int4TokenHead(BlockFormat):
    """4 bits with a zero point, of keys and values that were rotated at random first.

    A head's channels are given fixed random signs and a Hadamard rotation; then a token's smallest
    and largest numbers are 0 and 15. The scale is float32, with the zero point in its last bits.

    Source: vLLM's ``int4_per_token_head`` cache (Apache-2.0), which takes heads of a power of two
    of channels, and rounds what it has rotated to 16 bits before. Codes lie in another order here.
    """

    name = "int4_token_head"
    source = "vLLM, int4_per_token_head"
    bits = 4
    keeps_constants = False  # they are rotated

    @property
    def blocks(self) -> Blocks:
        """A token's head, rotated with signs, and 32 bits with a zero point."""
        return Blocks("integers", 4, 0, "single_zero", "signed")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Rounded to the nearest, halves away from zero."""
        import torch

        width = rows.shape[-1]
        turned = hadamard(rows * signs(width).to(rows.device)) * block_of(width) ** 0.5
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(_LEAST_SCALE)
        zero = _rounded(-low / scale).clamp(0, 15)
        codes = _rounded(turned / scale + zero).clamp(0, 15)
        marked = scale.contiguous().view(torch.int32) & ~_ZERO_POINT | zero.to(torch.int32)
        return BlockCodes(codes.to(torch.uint8), (marked.view(torch.float32),))


def _rounded(numbers: Tensor) -> Tensor:
    """To the nearest, halves away from zero."""
    return (numbers + numbers.sign() / 2).trunc()
