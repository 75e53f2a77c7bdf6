"""Numbers of a token in blocks of channels that share a scale: one description for all of them.

A format that says how its blocks lie, and which codes and scales it gives a token's numbers
(``formats.blocked.BlockFormat``), is packed, read back and counted by this description alone, and
has pages and a kernel without a line of its own there.

    number = (table[code] - zero) * scale, rotated back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Table = Literal["integers", "e2m1", "e4m3", "normal"]
Scales = Literal["none", "half", "half_zero", "single", "single_zero", "power", "e4m3"]
Rotation = Literal["none", "hadamard", "signed"]

TABLES: tuple[Table, ...] = ("integers", "e2m1", "e4m3", "normal")
"""What codes stand for: themselves; 4- and 8-bit floats; the best levels of a normal number, whose
highest bit is its sign and whose others count magnitudes from the smallest."""

SCALES: dict[Scales, int] = {
    "none": 0, "half": 2, "half_zero": 4, "single": 4, "single_zero": 4, "power": 1, "e4m3": 1,
}  # fmt: skip
"""Bytes of a block's scale, by how it lies: 16 bits, with a zero point in 16 more or without; 32
bits, in whose last four a zero point may lie; the exponent of a power of two; an 8-bit float that a
head's scale multiplies, which lies beside the head's lengths."""

WIDTHS = (0, 16, 32, 64)
"""Channels of a block in pages; 0 for all of a head."""

FIRST_NUMBER = 64
"""Kernels call blocks by numbers from this one on."""

_TURNED = 32  # of a number: it is rotated
_WIDTH, _SCALES, _SIGNED = 128, 512, 4096


@dataclass(frozen=True)
class Blocks:
    """How a token's numbers lie.

    Args:
        table: what codes stand for.
        bits: of a code.
        width: channels that share a scale; 0 for all of a head.
        scales: how a scale lies.
        rotation: of the channels, before: a Hadamard matrix; or signs, then that matrix without
            its norm.
    """

    table: Table
    bits: int
    width: int
    scales: Scales
    rotation: Rotation = "none"

    @property
    def number(self) -> int:
        """What kernels call this description, whose fields they read out of it."""
        signed = self.rotation == "signed"
        return (
            FIRST_NUMBER + (self.bits - 1) + 8 * TABLES.index(self.table)
            + _TURNED * (self.rotation != "none") + _WIDTH * WIDTHS.index(self.width)
            + _SCALES * [*SCALES].index(self.scales) + _SIGNED * signed
        )  # fmt: skip

    @property
    def fixed_zero(self) -> int:
        """The code that stands for zero where no scale says it."""
        counted = self.table == "integers" and not self.scales.endswith("_zero")
        return 2 ** (self.bits - 1) if counted else 0

    def width_of(self, head_dim: int) -> int:
        """Channels of a block in heads of this many."""
        return self.width or head_dim

    def count(self, head_dim: int) -> int:
        """Blocks of a token's head, a short last one among them."""
        return -(-head_dim // self.width_of(head_dim))

    def token_bytes(self, head_dim: int) -> int:
        """Bytes of a token's head: whole blocks' codes in whole bytes, and scales."""
        count, width = self.count(head_dim), self.width_of(head_dim)
        return -(-count * width * self.bits // 8) + count * SCALES[self.scales]

    def numbers(self, codes: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """``[..., D]`` float32 of codes by channel, rotated back.

        Args:
            codes: ``[..., D]`` of whole blocks.
            scales: ``[..., blocks]`` each, as ``fit`` gave them.
        """
        from kvtune.policies.formats.hadamard import hadamard

        rows = _looked_up(self, codes)
        if scales:
            scale, zero = _scale_and_zero(self, scales)
            blocks = rows.unflatten(-1, (scale.shape[-1], -1))
            if zero is not None:
                blocks = blocks - zero[..., None]
            rows = (blocks * scale[..., None]).flatten(-2)
        if self.rotation == "none":
            return rows
        turned = hadamard(rows)
        return turned if self.rotation == "hadamard" else unsigned(turned)


def unsigned(rows: Tensor) -> Tensor:
    """``[..., D]`` of the rotation with signs: divided by its norm, signs taken off."""
    from kvtune.policies.formats.hadamard import block_of

    width = rows.shape[-1]
    unsigned: Tensor = rows / block_of(width) ** 0.5 * signs(width).to(rows.device)
    return unsigned


@cache
def signs(head_dim: int) -> Tensor:
    """Of a head's channels, 1 or -1, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0x9E3779B9)
    half = torch.full((head_dim,), 0.5)
    return 2 * torch.bernoulli(half, generator=generator) - 1


def _looked_up(blocks: Blocks, codes: Tensor) -> Tensor:
    """What codes stand for, ``[..., D]`` float32."""
    import torch

    from kvtune.policies.formats.normal_codes import magnitudes

    if blocks.table == "integers":
        return codes.float()
    if blocks.table == "e4m3":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    some = E2M1 if blocks.table == "e2m1" else magnitudes(blocks.bits)
    table = torch.tensor([*some, *(-x for x in some)], device=codes.device)
    found: Tensor = table[codes.long()]
    return found


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of 4-bit floats by code; the highest bit is the sign."""

_ZERO_POINT = 15  # of a scale in 32 bits, whose last four hold it


def _scale_and_zero(blocks: Blocks, scales: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Both float32 ``[..., blocks]``; zero None where codes stand for signed numbers."""
    import torch

    first = scales[0]
    if blocks.scales == "single_zero":
        marked = first.contiguous().view(torch.int32)
        return (marked & ~_ZERO_POINT).view(torch.float32), (marked & _ZERO_POINT).float()
    if blocks.scales == "power":
        return power_of_two(first.int()), None
    if blocks.scales == "half_zero":
        return first.float(), scales[1].float()
    zero = torch.full_like(first, blocks.fixed_zero, dtype=torch.float32)
    return first.float(), zero if blocks.fixed_zero else None


def power_of_two(biased: Tensor) -> Tensor:
    """2 to the power of these exponents, which are 127 too large."""
    import torch

    return torch.ldexp(torch.ones(biased.shape, device=biased.device), biased - 127)
