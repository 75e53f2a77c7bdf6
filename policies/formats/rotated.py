"""Integer codes of rotated keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded, inner_codes, inner_numbers
from kvtune.policies.formats.grouped import Grouped
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.packed import Sections
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Clipped(Grouped):
    """Groups whose ends are drawn in: what lies beyond them takes the nearest code."""

    clip: float = 1.0

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        drawn_in = (high - low) * ((1 - self.clip) / 2)
        return super()._grid(low + drawn_in, high - drawn_in)


class _Eight(_Clipped):
    bits = 8


class _Four(_Clipped):
    bits = 4


class _Three(_Clipped):
    bits = 3


class _Two(_Clipped):
    bits = 2


_INNER: dict[int, type[_Clipped]] = {8: _Eight, 4: _Four, 3: _Three, 2: _Two}


@dataclass(frozen=True)
class Rotated(Coded):
    """Each key and each value times a Hadamard matrix, then stored as ``Grouped`` stores it.

    x' = x H / sqrt(D), codes and scales of x' in groups of ``group`` channels of a token
    q . x = q' . x', so that a reader rotates the query, never the keys;
    sum a x = (sum a x') H / sqrt(D), so that it rotates one output, never the values

    A rotation spreads an outlying channel over all of a token's, which then share a scale better.
    ``keys_by="channel"`` groups rotated keys along tokens. What is rotated is rounded like the
    rest: it costs no bytes.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024,
    arXiv 2404.00456, whose rotated caches have asymmetric groups of a token's channels. ``clip``
    is from Su et al., "RotateKV", IJCAI 2025, arXiv 2501.16383, who draw ranges in to 0.8 at two
    bits. Rotated numbers are nearly normal, and of 64 such the outermost lie at 2.4 standard
    deviations, while the best four even steps end at 1.5 and the best eight at 2.05 (Max,
    "Quantizing for Minimum Distortion", 1960): the defaults are near those ratios.
    """

    source = "Ashkboos et al., NeurIPS 2024, arXiv 2404.00456"
    projects = False  # clipped twice is clipped more
    keeps_constants = False  # a constant token becomes one large channel, and 16-bit scales round

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)
    keys_by: Literal["channel", "token"] = parameter(
        "token", "whose elements share a rotated key's scale; values' are always a token's"
    )
    clip: float = parameter(1.0, "what is left of a group's range", low=0.5, high=1)

    @property
    def label(self) -> str:
        """``rotated_int2``, ``rotated_int2-channel+4`` by channel with four tokens exact."""
        grouping = "-channel" if self.keys_by == "channel" else ""
        return self.name + grouping + (f"+{self.exact_first}" if self.exact_first else "")

    @property
    def inner(self) -> Grouped:
        """What stores the rotated numbers."""
        return _INNER[self.bits](group=self.group, keys_by=self.keys_by, clip=self.clip)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """The bytes of the format without its rotation: the matrix is not stored."""
        return self.inner.bound(tokens, head_dim, role)

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """As without the rotation, which queries and outputs take part in."""
        inner = self.inner.packed(tokens, head_dim, role)
        return inner and tuple(replace(each, turned=True) for each in inner)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of the rotated rows."""
        return inner_codes(self.inner, hadamard(rows), role)

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The decoded numbers, rotated back."""
        return hadamard(inner_numbers(self.inner, buffers, shape, role))

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """All heads at once."""
        import torch

        exact, coded = tensor[..., : self.exact_first, :], tensor[..., self.exact_first :, :]
        left = (counts - self.exact_first).clamp_min(0)
        stored = hadamard(self.inner.roundtrip(hadamard(coded.float()), left, role))
        return torch.cat([exact, stored.to(tensor.dtype)], dim=-2)


@dataclass(frozen=True)
class RotatedInt8(Rotated):
    """8 bits an element; see ``Rotated``."""

    name = "rotated_int8"
    bits = 8


@dataclass(frozen=True)
class RotatedInt4(Rotated):
    """4 bits an element; see ``Rotated``."""

    name = "rotated_int4"
    bits = 4


@dataclass(frozen=True)
class RotatedInt3(Rotated):
    """3 bits an element; see ``Rotated``."""

    name = "rotated_int3"
    bits = 3

    clip: float = parameter(0.85, "what is left of a group's range", low=0.5, high=1)


@dataclass(frozen=True)
class RotatedInt2(Rotated):
    """2 bits an element; see ``Rotated``."""

    name = "rotated_int2"
    bits = 2

    clip: float = parameter(0.7, "what is left of a group's range", low=0.5, high=1)
