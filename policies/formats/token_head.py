"""8 and 4 bits with one scale a token and head, as serving engines store them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.hadamard import block_of, hadamard
from kvtune.policies.formats.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Int8TokenHead(Coded):
    """Symmetric integers: the largest magnitude of a token's head is 127; scales are float32.

    Source: vLLM's ``int8_per_token_head`` cache (Apache-2.0).
    """

    name = "int8_token_head"
    source = "vLLM, int8_per_token_head"
    bits = 8

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """A byte a number, four a token."""
        return tokens * (head_dim + 4)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Rounded to the nearest."""
        import torch

        scales = rows.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 127
        return {"codes": (rows / scales).round().to(torch.int8), "scales": scales}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that the codes and scales stand for."""
        return buffers["codes"].float() * buffers["scales"]


@dataclass(frozen=True)
class Fp8TokenHead(Coded):
    """e4m3 numbers: the largest magnitude of a token's head is 448; scales are float32.

    Source: vLLM's ``fp8_per_token_head`` cache (Apache-2.0); SGLang keeps one scale a tensor, which
    is ``fp8`` but for the head.
    """

    name = "fp8_token_head"
    source = "vLLM, fp8_per_token_head"
    bits = 8

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """A byte a number, four a token."""
        return tokens * (head_dim + 4)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The scaled rows cast to e4m3, and their scales."""
        import torch

        scales = rows.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 448
        return {"codes": (rows / scales).clamp(-448, 448).to(torch.float8_e4m3fn), "scales": scales}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that the e4m3 codes and scales stand for."""
        return buffers["codes"].float() * buffers["scales"]


_LEAST_SCALE = 1e-6
_ZERO_POINT = 15  # of a scale's mantissa, whose last four bits hold it


@dataclass(frozen=True)
class Int4TokenHead(Coded):
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

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Half a byte a number, four bytes a token."""
        return tokens * (-(-head_dim // 2) + 4)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Rounded to the nearest, halves away from zero."""
        import torch

        turned = hadamard(rows * _signs(rows.shape[1]).to(rows.device)) * _norm(rows.shape[1])
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(_LEAST_SCALE)
        zero = _rounded(-low / scale).clamp(0, 15)
        codes = _rounded(turned / scale + zero).clamp(0, 15)
        marked = scale.contiguous().view(torch.int32) & ~_ZERO_POINT | zero.to(torch.int32)
        return {"codes": pack(codes, 4), "scales": marked.view(torch.float32)}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Codes beyond the zero point, times the scale, rotated back."""
        import torch

        marked = buffers["scales"].contiguous().view(torch.int32)
        zero = (marked & _ZERO_POINT).float()
        scale = (marked & ~_ZERO_POINT).view(torch.float32)
        turned = (unpack(buffers["codes"], 4, shape[1]) - zero) * scale
        return hadamard(turned) / _norm(shape[1]) * _signs(shape[1]).to(turned.device)


def _rounded(numbers: Tensor) -> Tensor:
    """To the nearest, halves away from zero."""
    return (numbers + numbers.sign() / 2).trunc()


def _norm(head_dim: int) -> float:
    """By how much vLLM's rotation, which is not divided by it, lengthens a row."""
    norm: float = block_of(head_dim) ** 0.5
    return norm


@functools.cache
def _signs(head_dim: int) -> Tensor:
    """Of a head's channels, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0x9E3779B9)
    half = torch.full((head_dim,), 0.5)
    return 2 * torch.bernoulli(half, generator=generator) - 1
