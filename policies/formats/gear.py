"""GEAR: few bits for most, a low-rank matrix for the error, and the outliers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kvtune.policies.format import Format, Role, Stored
from kvtune.policies.formats.coded import inner_packed
from kvtune.policies.formats.grouped import Grouped, Int2, Int4
from kvtune.policies.formats.outliers import outlier_buffers, outlier_bytes, with_outliers
from kvtune.policies.packed import MOST_RANK, Section, Sections
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR_BYTES = 2
_ITERATIONS = 3
_BACKBONES: dict[str, type[Grouped]] = {"int2": Int2, "int4": Int4}


@dataclass(frozen=True)
class Gear(Format):
    """X is about D + L + S: quantised, low rank, sparse.

    S = what the others lack of the largest and the smallest ``outliers / 2`` of a row, for which
    D has the row's mean
    D = the rest in the ``backbone``'s groups; a row is a channel of keys, a token of values
    L = Q P^T of rank ``rank``, fitted to X - D - S by power iteration, in 16 bits

    Source: Kang et al., "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless
    Generative Inference of LLM", arXiv 2403.05527; two bits, groups of 64, rank 4 and 2 % outliers
    are the authors' settings for the KIVI backbone. Differs: a row of values is one token of one
    head, of which at least one number at either end is exact (the authors count over all heads
    together); the prompt is compressed whole, without a buffer of newest tokens. ``outliers: 0`` is
    GEAR-L.
    """

    name = "gear"
    source = "Kang et al., arXiv 2403.05527"
    bits = 2
    projects = False

    backbone: Literal["int2", "int4"] = parameter("int2", "how most numbers are stored")
    group: int = parameter(64, "elements that share a scale", unit="elements", low=2, high=4096)
    rank: int = parameter(4, "columns of the low-rank factors", unit="columns", low=0, high=64)
    outliers: float = parameter(0.02, "share of numbers that stay exact", low=0, high=0.5)

    @property
    def label(self) -> str:
        """``gear``, or ``gear4`` on four bits."""
        return "gear" if self.backbone == "int2" else "gear4"

    @property
    def _backbone(self) -> Grouped:
        return _BACKBONES[self.backbone](group=self.group)

    def _exact_at_either_end(self, row: int) -> int:
        """Outliers at either end of a row of so many numbers."""
        if self.outliers == 0 or row < 2:
            return 0
        return min(max(int(self.outliers * row / 2), 1), row // 2)

    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """Codes and scales, both factors, and value and place of every outlier."""
        row, rows = (tokens, head_dim) if role == "keys" else (head_dim, tokens)
        sparse = outlier_bytes(2 * self._exact_at_either_end(row) * rows, tokens)
        rank = min(self.rank, tokens, head_dim)
        low_rank = _FACTOR_BYTES * rank * (tokens + head_dim)
        return self._backbone.bound(tokens, head_dim, role) + sparse + low_rank

    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """The backbone's buffers, the factors, and the outliers with their places."""
        rows = (tensor.T if role == "keys" else tensor).float()
        places = self._outliers(rows)
        tame = _tamed(rows, places)
        backbone = self._backbone
        stored = backbone.encode(tame.T if role == "keys" else tame, role)
        back = backbone.decode(stored, tensor.shape[1], role)
        error = tensor.float() - back
        along = error.T if role == "keys" else error
        error = (along.scatter(1, places, 0.0)).T if role == "keys" else along.scatter(1, places, 0)
        left, right = _factors(error, min(self.rank, *error.shape))
        buffers = {f"backbone {name}": buffer for name, buffer in stored.buffers.items()}
        buffers |= {"left": left.half(), "right": right.half()}
        rest = tensor.float() - back - left.half().float() @ right.half().float().T
        return Stored(buffers | outlier_buffers(rest, places, role), len(tensor))

    def packed(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """The backbone's, factors and outliers added."""
        found = inner_packed(self._backbone, tokens, head_dim, role, "backbone ")
        if found is None or self.rank > MOST_RANK:
            return None
        row = tokens if role == "keys" else head_dim
        return tuple(self._with_rest(each, min(self.rank, tokens, head_dim), row) for each in found)

    def _with_rest(self, section: Section, rank: int, row: int) -> Section:
        patched = self._exact_at_either_end(row) > 0
        reading = replace(section.reading, rank=rank, patched=patched)
        names = ("left", "right") * (rank > 0) + ("starts", "places", "outliers") * patched
        own = {name: name for name in names}
        return replace(section, reading=reading, buffers={**section.buffers, **own})

    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """Backbone plus low rank, the outliers put back."""
        found: Mapping[str, Tensor] = stored.buffers
        own = {
            name.removeprefix("backbone "): buffer
            for name, buffer in found.items()
            if name.startswith("backbone ")
        }
        back = self._backbone.decode(Stored(own, stored.tokens), head_dim, role)
        back = back + found["left"].float() @ found["right"].float().T
        return with_outliers(back, found)

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Row by row; what lies beyond a row's tokens comes back as zeros."""
        import torch

        flat = tensor.reshape(counts.numel(), *tensor.shape[-2:])
        back = torch.zeros_like(flat)
        for row, count in enumerate(counts.flatten().tolist()):
            if count:
                stored = self.encode(flat[row, :count], role)
                back[row, :count] = self.decode(stored, tensor.shape[-1], role).to(tensor.dtype)
        return back.view_as(tensor)

    def _outliers(self, rows: Tensor) -> Tensor:
        """Places of each row's largest and smallest numbers, ``[R, 2 k]``."""
        import torch

        count = self._exact_at_either_end(rows.shape[1])
        order = rows.argsort(dim=1, stable=True)
        return torch.cat([order[:, :count], order[:, order.shape[1] - count :]], 1)


def _tamed(rows: Tensor, places: Tensor) -> Tensor:
    """The rows with their mean where the outliers were."""
    return rows.scatter(1, places, rows.mean(1, keepdim=True).expand_as(places))


def _factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[n, r]`` and ``[D, r]`` whose product is near ``[n, D]``, by power iteration."""
    import torch

    start = torch.rand(error.shape[1], rank, generator=torch.Generator().manual_seed(0))
    right = start.to(error.device)
    left = error @ right
    for _ in range(_ITERATIONS - 1):
        right = torch.linalg.qr(error.T @ left).Q
        left = error @ right
    left = torch.linalg.qr(left).Q if rank else left
    return left, error.T @ left
