"""SAQ: precision falls in steps with a token's age."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded, inner_codes, inner_numbers, inner_packed
from kvtune.policies.formats.grouped import Grouped, Int2, Int4, Int8
from kvtune.policies.packed import Sections, joined
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Staircase(Coded):
    """The newest tokens in 16 bits, those before them in eight, then in four, the oldest in two.

    Source: "SAQ: Staircase Adaptive Quantization", arXiv 2410.18441, from its abstract: KIVI's
    groups, with a precision that falls with age. The bands' lengths are ours: a reconstruction.
    A token here takes its place once, when the prompt is stored.
    """

    name = "staircase"
    source = "arXiv 2410.18441, reconstructed"
    bits = 2

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)
    sixteen: int = parameter(64, "newest, in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT)
    eight: int = parameter(128, "before them, in 8", unit="tokens", low=0, high=LONGEST_PROMPT)
    four: int = parameter(256, "before those, in 4", unit="tokens", low=0, high=LONGEST_PROMPT)

    def newest(self, tokens: int, role: Role) -> int:
        """How many of the newest tokens stay in 16 bits."""
        return self.sixteen

    def _bands(self, tokens: int) -> Iterator[tuple[str, Grouped, slice]]:
        """The bands of coded tokens that are not empty, the oldest first."""
        four = max(tokens - self.eight - self.four, 0)
        eight = max(tokens - self.eight, 0)
        for name, kind, start, stop in (
            ("two ", Int2, 0, four), ("four ", Int4, four, eight), ("eight ", Int8, eight, tokens)
        ):  # fmt: skip
            if stop > start:
                yield name, kind(group=self.group), slice(start, stop)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes of all bands together."""
        bands = self._bands(tokens)
        return sum(form.bound(mine.stop - mine.start, head_dim, role) for _, form, mine in bands)

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """Band by band."""
        return joined(
            sections and tuple(each.moved(mine.start) for each in sections)
            for name, form, mine in self._bands(tokens)
            for sections in [inner_packed(form, mine.stop - mine.start, head_dim, role, name)]
        )

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of every band."""
        buffers: dict[str, Tensor] = {}
        for name, form, mine in self._bands(len(rows)):
            buffers |= inner_codes(form, rows[mine], role, name)
        return buffers

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """The numbers that the codes of every band stand for."""
        import torch

        tokens, head_dim = shape
        parts = [
            inner_numbers(form, buffers, (mine.stop - mine.start, head_dim), role, name)
            for name, form, mine in self._bands(tokens)
        ]
        return torch.cat(parts)
