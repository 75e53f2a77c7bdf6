"""8 bits with one scale a token and head, as serving engines store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded

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
