"""Kitty: two bits, and four for the key channels that vary most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded, inner_codes, inner_numbers, inner_packed
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.packed import Section, Sections
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kitty(Coded):
    """Keys per channel in two bits, ``boosted`` of the channels in four; values in two, per token.

    boosted channels = those whose keys range furthest, chosen for each head

    Source: "Kitty: Accurate and Efficient 2-bit KV Cache Quantization with Dynamic Channel-wise
    Precision Boost", arXiv 2511.18643, from its abstract: a small share of key channels, ranked by
    sensitivity, stays in more bits. Differs: the ranking is by range, an eighth of the channels is
    boosted, and groups are of 64; a reconstruction.
    """

    name = "kitty"
    source = "arXiv 2511.18643, reconstructed"
    bits = 2
    projects = False  # the channels that range furthest may be others afterwards

    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)
    boosted: float = parameter(0.125, "share of key channels in four bits", low=0, high=1)

    def _boosted(self, head_dim: int, role: Role) -> int:
        return int(self.boosted * head_dim) if role == "keys" else 0

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Both widths, and the boosted channels' places in 16 bits."""
        many = self._boosted(head_dim, role)
        wide = Int4(self.group).bound(tokens, many, role) if many else 0
        few = head_dim - many
        return wide + (Int2(self.group).bound(tokens, few, role) if few else 0) + 2 * many

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """Channels of both widths are read together, those in two bits by what is left of them."""
        many = self._boosted(head_dim, role)
        if many == head_dim:
            return inner_packed(Int4(self.group), tokens, head_dim, role, "wide ")
        few = inner_packed(Int2(self.group), tokens, head_dim, role, "few ")
        return few and tuple(_with_wide(each) if many else each for each in few)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of narrow and wide channels, and which channels are wide."""
        import torch

        order = (rows.amax(0) - rows.amin(0)).argsort(descending=True, stable=True)
        many = self._boosted(rows.shape[1], role)
        wide, few = order[:many].sort().values, order[many:].sort().values
        buffers = {"places": wide.to(torch.int16)}
        for name, form, channels in (("wide", Int4, wide), ("few", Int2, few)):
            if len(channels):
                buffers |= inner_codes(form(self.group), rows[:, channels], role, f"{name} ")
        return buffers

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Both groups of channels, each in its places."""
        import torch

        tokens, head_dim = shape
        places = buffers["places"].long()
        few = torch.ones(head_dim, device=places.device).scatter(0, places, 0)
        channels = few.argsort(stable=True)  # the wide ones first, both ascending as they lie
        counts = len(places), head_dim - len(places)
        parts = [
            inner_numbers(form(self.group), buffers, (tokens, count), role, f"{name} ")
            for name, form, count in zip(("wide", "few"), (Int4, Int2), counts, strict=True)
            if count
        ]
        return torch.cat(parts, 1)[:, channels.argsort()]


def _with_wide(few: Section) -> Section:
    """A section of channels in two bits, and beside them those in four."""
    wide = {f"wide {key}": name.replace("few ", "wide ") for key, name in few.buffers.items()}
    reading = replace(few.reading, widths="channels")
    return replace(few, reading=reading, buffers={**few.buffers, **wide, "widths": "places"})
