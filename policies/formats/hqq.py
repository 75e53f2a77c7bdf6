"""HQQ: the offset of a group is fitted so that few errors are large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.policies.blocks import WIDTHS, Blocks
from kvtune.policies.formats.blocked import BlockCodes, BlockFormat
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS, _NORM, _STRENGTH = 20, 0.7, 10.0
_LARGEST_SCALE = 2e4
_LARGEST_ZERO = 6e4  # a zero point is a number of 16 bits


@dataclass(frozen=True)
class Hqq(BlockFormat):
    """Groups of a token's channels; offsets by half-quadratic splitting, scales by the range.

    scale = (2^b - 1) / (max - min), zero = -min * scale; then, while the mean error falls,
    q = round(x * scale + zero), e = x - (q - zero) / scale, shrunk by |e|^(0.7 - 1) / 10,
    zero = mean of q - (x - e) * scale

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
    as transformers' quantised cache stores keys and values by default. Differs: each group stops
    when its own mean error no longer falls, not all of a tensor together, so that a token's codes
    are its own.
    """

    source = "Badri and Shaji, 2023"
    projects = False
    keeps_constants = False  # a scale is at most 2e4, and a zero point 6e4

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)

    @property
    def label(self) -> str:
        """``hqq4``, ``hqq4/32`` in groups of 32."""
        group = f"/{self.group}" if self.group != 64 else ""
        return super().label.replace(self.name, self.name + group)

    @property
    def blocks(self) -> Blocks:
        """Groups, integers and 16 bits with a zero point in 16 more."""
        return Blocks("integers", self.bits, self.group, "half_zero")

    def blocks_in(self, head_dim: int) -> Blocks:
        """A group is at most a token's head."""
        return replace(self.blocks, width=min(self.group, head_dim))

    @classmethod
    def in_pages(cls) -> tuple[BlockFormat, ...]:
        """In groups that pages have."""
        return tuple(cls(group=width) for width in WIDTHS if width)

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """Fitted group by group; a short last group repeats its last channel."""
        import torch

        width = min(self.group, rows.shape[-1])
        fill = rows[..., -1:].expand(*rows.shape[:-1], -rows.shape[-1] % width)
        groups = torch.cat([rows, fill], -1).unflatten(-1, (-1, width))
        scale, zero = self._fitted(groups)
        step, zero = (1 / scale).half(), zero.half()
        codes = (groups * scale + zero.float()).round().clamp(0, 2**self.bits - 1)
        return BlockCodes(codes.to(torch.uint8).flatten(-2), (step[..., 0], zero[..., 0]))

    def _fitted(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        most = 2**self.bits - 1
        farthest = torch.maximum(low.abs(), high.abs()).clamp_min(1e-30)
        steepest = (_LARGEST_ZERO / farthest).clamp_max(_LARGEST_SCALE)
        scale = (most / (high - low).clamp_min(1e-30)).minimum(steepest)
        zero = kept = -low * scale
        best, falls = torch.full_like(low, torch.inf), torch.ones_like(low, dtype=torch.bool)
        for _ in range(_ROUNDS):
            codes = (groups * scale + zero).round().clamp(0, most)
            rest = groups - (codes - zero) / scale
            size = rest.abs()
            mean = size.mean(-1, keepdim=True)
            falls = falls & (mean < best)
            best, kept = torch.where(falls, mean, best), torch.where(falls, zero, kept)
            shrunk = rest.sign() * (size - size.clamp_min(1e-8) ** (_NORM - 1) / _STRENGTH).relu()
            zero = (codes - (groups - shrunk) * scale).mean(-1, keepdim=True)
        return scale, kept.clamp(-_LARGEST_ZERO, _LARGEST_ZERO)


@dataclass(frozen=True)
class Hqq4(Hqq):
    """4 bits an element; see ``Hqq``."""

    name = "hqq4"
    bits = 4


@dataclass(frozen=True)
class Hqq2(Hqq):
    """2 bits an element; see ``Hqq``."""

    name = "hqq2"
    bits = 2
