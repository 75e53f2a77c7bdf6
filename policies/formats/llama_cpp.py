"""llama.cpp's blocks of 32: q8_0 and q4_0, rotated or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 32


@dataclass(frozen=True)
class Blocks32(Coded):
    """Blocks of 32 channels of a token, each with one 16-bit scale in front of its codes.

    The buffer is the bytes that ggml writes. A last short block is filled up with zeros, where ggml
    wants whole ones. ``rotation: hadamard`` is what newer llama.cpp does to keys and values first.

    Source: ``ggml-quants.c`` of llama.cpp (MIT); its own arithmetic in Python is the package gguf.
    """

    source = "llama.cpp, ggml-quants.c"
    keeps_constants = False  # a 16-bit scale of tiny numbers rounds

    rotation: Literal["none", "hadamard"] = parameter("none", "of keys and values, before")

    @property
    def label(self) -> str:
        """The format's name, and whether it rotates: ``q4_0`` or ``q4_0-rotated``."""
        return super().label.replace(
            self.name, self.name + ("-rotated" if self.rotation != "none" else "")
        )

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes of the whole blocks that hold so many tokens."""
        return tokens * -(-head_dim // _BLOCK) * (2 + _BLOCK * self.bits // 8)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Blocks of each row, scale first."""
        import torch
        import torch.nn.functional as F

        turned = hadamard(rows) if self.rotation != "none" else rows
        blocks = F.pad(turned, (0, -rows.shape[1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
        scale = self._scale(blocks)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        laid = self._laid(blocks * inverse)
        return {"blocks": torch.cat([scale.half().view(torch.uint8), laid], -1)}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that the codes and scales stand for."""
        import torch

        blocks = buffers["blocks"]
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        rows = (scale * self._read(blocks[..., 2:])).flatten(-2)[:, : shape[1]]
        return hadamard(rows) if self.rotation != "none" else rows

    @abstractmethod
    def _scale(self, blocks: Tensor) -> Tensor:
        """The scale of each block, float32."""

    @abstractmethod
    def _laid(self, scaled: Tensor) -> Tensor:
        """Codes of scaled blocks, as bytes."""

    @abstractmethod
    def _read(self, laid: Tensor) -> Tensor:
        """The codes of these bytes, float32."""


@dataclass(frozen=True)
class Q8(Blocks32):
    """8 bits: the largest magnitude is 127; see ``Blocks32``."""

    name = "q8_0"
    bits = 8

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1, keepdim=True) / 127

    def _laid(self, scaled: Tensor) -> Tensor:
        import torch

        away_from_zero = scaled.sign() * (scaled.abs() + 0.5).floor()  # as C's roundf
        return away_from_zero.to(torch.int8).view(torch.uint8)

    def _read(self, laid: Tensor) -> Tensor:
        import torch

        return laid.contiguous().view(torch.int8).float()


@dataclass(frozen=True)
class Q4(Blocks32):
    """4 bits: the number of largest magnitude is -8; see ``Blocks32``."""

    name = "q4_0"
    bits = 4

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8

    def _laid(self, scaled: Tensor) -> Tensor:
        import torch

        codes = (scaled + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        first, second = codes.chunk(2, -1)
        return first | (second << 4)

    def _read(self, laid: Tensor) -> Tensor:
        import torch

        return torch.cat([laid & 15, laid >> 4], -1).float() - 8
