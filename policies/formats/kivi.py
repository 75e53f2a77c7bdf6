"""KIVI as published: two bits in small groups, and the newest tokens as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded, inner_codes, inner_numbers
from kvtune.policies.formats.grouped import Grouped, Int2, Int4
from kvtune.policies.packed import Sections
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor

_BACKBONES: dict[str, type[Grouped]] = {"int2": Int2, "int4": Int4}


@dataclass(frozen=True)
class Kivi(Coded):
    """Keys per channel, values per token, the newest ``residual`` tokens in 16 bits.

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
    arXiv 2402.02750; groups of 32 and a window of 128 are those of its LongBench table. Differs:
    keys leave exactly ``residual`` tokens exact, as values do; the authors' keys leave from none to
    one fewer, since they are coded a window at a time.
    """

    name = "kivi"
    source = "Liu et al., ICML 2024, arXiv 2402.02750"
    bits = 2

    backbone: Literal["int2", "int4"] = parameter("int2", "how older tokens are stored")
    group: int = parameter(32, "elements that share a scale", unit="elements", low=2, high=4096)
    residual: int = parameter(
        128, "newest tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )

    @property
    def label(self) -> str:
        """``kivi``, or ``kivi4`` on four bits."""
        return super().label.replace("kivi", "kivi" if self.backbone == "int2" else "kivi4")

    @property
    def coded(self) -> Grouped:
        """What stores older tokens."""
        return _BACKBONES[self.backbone](group=self.group)

    def newest(self, tokens: int, role: Role) -> int:
        """The residual window."""
        return min(self.residual, tokens)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes of the codes of all but the newest tokens."""
        return self.coded.bound(tokens, head_dim, role)

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """As older tokens are stored."""
        return self.coded.packed(tokens, head_dim, role)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of all but the newest tokens."""
        return inner_codes(self.coded, rows, role)

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that those codes stand for."""
        return inner_numbers(self.coded, buffers, shape, role)
