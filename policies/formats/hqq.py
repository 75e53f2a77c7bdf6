"""HQQ: the offset of a group is fitted so that few errors are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS, _NORM, _STRENGTH = 20, 0.7, 10.0
_LARGEST_SCALE = 2e4


@dataclass(frozen=True)
class Hqq(Coded):
    """Groups of a token's channels; offsets by half-quadratic splitting, scales by the range.

    scale = (2^b - 1) / (max - min), zero = -min * scale; then, while the mean error falls,
    q = round(x * scale + zero), e = x - (q - zero) / scale, shrunk by |e|^(0.7 - 1) / 10,
    zero = mean of q - (x - e) * scale

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
    as transformers' quantised cache stores keys and values by default.
    """

    source = "Badri and Shaji, 2023"
    projects = False
    keeps_constants = False  # a scale is at most 2e4

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Whole groups, a short last one among them, with scale and zero in 16 bits."""
        width = min(self.group, head_dim)
        groups = tokens * -(-head_dim // width)
        return groups * (-(-width * self.bits // 8) + 4)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """Fitted group by group; a short last group repeats its last channel."""
        import torch

        width = min(self.group, rows.shape[1])
        fill = rows[:, -1:].expand(-1, -rows.shape[1] % width)
        groups = torch.cat([rows, fill], 1).unflatten(-1, (-1, width))
        scale, zero = self._fitted(groups)
        step, zero = (1 / scale).half(), zero.half()
        codes = (groups * scale + zero.float()).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack(codes, self.bits), "scales": torch.cat([step, zero], -1)}

    def _fitted(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        most = 2**self.bits - 1
        scale = (most / (high - low).clamp_min(1e-30)).clamp_max(_LARGEST_SCALE)
        zero, best = -low * scale, torch.inf
        kept = zero
        for _ in range(_ROUNDS):
            codes = (groups * scale + zero).round().clamp(0, most)
            rest = groups - (codes - zero) / scale
            mean = float(rest.abs().mean())
            if mean >= best:
                break
            size = rest.abs()
            shrunk = rest.sign() * (size - size.clamp_min(1e-8) ** (_NORM - 1) / _STRENGTH).relu()
            best, kept = mean, zero
            zero = (codes - (groups - shrunk) * scale).mean(-1, keepdim=True)
        return scale, kept

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """(Code - zero) / scale."""
        width = min(self.group, shape[1])
        step, zero = buffers["scales"].float().split(1, -1)
        groups: Tensor = (unpack(buffers["codes"], self.bits, width) - zero) * step
        return groups.flatten(-2)[:, : shape[1]]


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
