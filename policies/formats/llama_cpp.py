"""llama.cpp's blocks of 32: q8_0 and q4_0, rotated or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.blocks import Blocks
from kvtune.policies.format import Role
from kvtune.policies.formats.blocked import BlockCodes, BlockFormat, padded_blocks
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 32


@dataclass(frozen=True)
class Blocks32(BlockFormat):
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

    @property
    def blocks(self) -> Blocks:
        """32 channels, integers and 16 bits."""
        return Blocks("integers", self.bits, _BLOCK, "half", self.rotation)

    @classmethod
    def in_pages(cls) -> tuple[BlockFormat, ...]:
        """Rotated and not."""
        return cls(), cls(rotation="hadamard")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Codes from zero on, and a scale a block."""
        import torch

        blocks = padded_blocks(hadamard(rows) if self.rotation != "none" else rows, _BLOCK)
        scale = self._scale(blocks)
        codes = self._codes(blocks * torch.where(scale == 0, 0.0, 1 / scale))
        return BlockCodes(codes.to(torch.uint8).flatten(-2), (scale.half()[..., 0],))

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Blocks of each row as ggml writes them, scale first."""
        import torch

        fit = self.fit(rows)
        scale = fit.scales[0][..., None].view(torch.uint8)
        return {"blocks": torch.cat([scale, self._laid(fit.codes.unflatten(-1, (-1, _BLOCK)))], -1)}

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that the codes and scales stand for."""
        import torch

        blocks = buffers["blocks"]
        scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
        codes = self._read(blocks[..., 2:]).flatten(-2)
        return self.blocks.numbers(codes, (scale,))[:, : shape[1]]

    @abstractmethod
    def _scale(self, blocks: Tensor) -> Tensor:
        """The scale of each block, float32."""

    @abstractmethod
    def _codes(self, scaled: Tensor) -> Tensor:
        """Codes of scaled blocks, the smallest 0."""

    @abstractmethod
    def _laid(self, codes: Tensor) -> Tensor:
        """These codes as ggml's bytes."""

    @abstractmethod
    def _read(self, laid: Tensor) -> Tensor:
        """The codes of these bytes."""


@dataclass(frozen=True)
class Q8(Blocks32):
    """8 bits: the largest magnitude is 127; see ``Blocks32``."""

    name = "q8_0"
    bits = 8

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1, keepdim=True) / 127

    def _codes(self, scaled: Tensor) -> Tensor:
        away_from_zero = scaled.sign() * (scaled.abs() + 0.5).floor()  # as C's roundf
        return away_from_zero + 128

    def _laid(self, codes: Tensor) -> Tensor:
        return codes ^ 128

    def _read(self, laid: Tensor) -> Tensor:
        return laid ^ 128


@dataclass(frozen=True)
class Q4(Blocks32):
    """4 bits: the number of largest magnitude is -8; see ``Blocks32``."""

    name = "q4_0"
    bits = 4

    def _scale(self, blocks: Tensor) -> Tensor:
        return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8

    def _codes(self, scaled: Tensor) -> Tensor:
        return (scaled + 8.5).trunc().clamp(0, 15)

    def _laid(self, codes: Tensor) -> Tensor:
        first, second = codes.chunk(2, -1)
        return first | (second << 4)

    def _read(self, laid: Tensor) -> Tensor:
        import torch

        return torch.cat([laid & 15, laid >> 4], -1)
