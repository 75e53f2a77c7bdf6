"""KVQuant: levels where the numbers are, and the outliers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.outliers import outlier_buffers, outlier_bytes, with_outliers
from kvtune.policies.formats.packing import pack, unpack
from kvtune.policies.packed import Reading, Section, Sections
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 15  # of k-means


@dataclass(frozen=True)
class KvQuant(Coded):
    """Three bits whose eight levels are fitted to the head's numbers; 1 % of each row exact.

    row = a channel of keys, a token of values; outliers = its largest and smallest numbers
    x' = (x - middle) / half range of the rest, so that -1 <= x' <= 1
    levels = 8 means of all x' of the head; code = the nearest
    outliers are stored as what their levels lack, in 16 bits, and added

    Source: Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache
    Quantization", NeurIPS 2024, arXiv 2401.18079; 3 bits, 1 % and the first token exact are the
    authors'. Differs: keys are coded after their rotary embedding, ranges and levels are fitted to
    the prompt itself and without gradients, and a row has one outlier at either end at least.
    """

    name = "kvquant"
    source = "Hooper et al., NeurIPS 2024, arXiv 2401.18079"
    bits = 3
    projects = False
    keeps_constants = False

    exact_first: int = parameter(
        1, "first kept tokens left in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    outliers: float = parameter(0.01, "share of numbers that stay exact", low=0, high=0.5)

    def _at_either_end(self, row: int) -> int:
        if self.outliers == 0 or row < 4:
            return 0
        return min(max(int(self.outliers * row / 2), 1), row // 2 - 1)

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Packed rows with two scales each, outliers with their places, and the levels."""
        row, rows = (tokens, head_dim) if role == "keys" else (head_dim, tokens)
        each, levels = -(-row * self.bits // 8) + 4, 2**self.bits
        outliers = outlier_bytes(2 * self._at_either_end(row) * rows, tokens)
        return rows * each + 2 * int(levels) + outliers

    def packed_codes(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """Rows of one group each, levels and outliers."""
        along, row = ("channels", tokens) if role == "keys" else ("tokens", head_dim)
        patched = self._at_either_end(row) > 0
        reading = Reading(self.bits, along, levels=True, patched=patched)  # type: ignore[arg-type]
        names = ("codes", "scales", "levels", *(("starts", "places", "outliers") * patched))
        return (Section(0, tokens, reading, {name: name for name in names}, row),)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The rows' codes, with levels and outliers fitted to them."""
        import torch

        lines = rows.T if role == "keys" else rows
        count = self._at_either_end(lines.shape[1])
        order = lines.argsort(dim=1, stable=True)
        last = lines.shape[1] - count
        places = torch.cat([order[:, :count], order[:, last:]], 1)
        ends = lines.gather(1, torch.stack([order[:, count], order[:, last - 1]], 1))
        middle = ends.mean(1, keepdim=True).half()
        half = ((ends[:, 1:] - ends[:, :1]) / 2).half()
        unit = (lines - middle.float()) / torch.where(half > 0, half, 1.0).float()
        levels = _means(unit.clamp(-1, 1).flatten(), 2**self.bits).half()
        codes = _nearest(unit, levels.float())
        rest = lines - (levels.float()[codes] * half.float() + middle.float())
        return {
            "codes": pack(codes, self.bits),
            "scales": torch.cat([half, middle], 1), "levels": levels,
            **outlier_buffers(rest.T if role == "keys" else rest, places, role),
        }  # fmt: skip

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Levels in each row's range, the outliers put back."""
        width = shape[0] if role == "keys" else shape[1]
        half, middle = buffers["scales"].float().split(1, 1)
        level = buffers["levels"].float()[unpack(buffers["codes"], self.bits, width)]
        lines = level * half + middle
        return with_outliers(lines.T if role == "keys" else lines, buffers)


def _means(numbers: Tensor, count: int) -> Tensor:
    """Ascending means of ``count`` clusters of numbers, from evenly spaced quantiles on."""
    import torch

    ranked = numbers.sort().values
    at = (torch.arange(count, device=numbers.device) + 0.5) / count * len(ranked)
    means = ranked[at.long()]
    sums = torch.cat([ranked.new_zeros(1, dtype=torch.double), ranked.double().cumsum(0)])
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(ranked, (means[1:] + means[:-1]) / 2)
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(ranked))])
        held = ends[1:] - ends[:-1]
        total = sums[ends[1:]] - sums[ends[:-1]]
        means = torch.where(held > 0, (total / held.clamp_min(1)).float(), means)
    return means


def _nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    import torch

    codes: Tensor = torch.bucketize(numbers.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return codes
