"""Keys in a few bits, read pass by pass: all in very few, the likely ones in more, the best whole.

What counts of a key is what queries make of it. Keys are turned into directions that are scaled by
how much queries ask of them and ordered by how much keys then differ; each pass gives its bits to
the directions where an error would cost products most, and stores a number of levels for each. A
search ranks all keys by the first pass, those that lead by the second, and so on, and compares
whole keys with what is left of the bytes that it may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Keys = Tensor

_NUMBER_BYTES = 2  # of keys and of levels
_ROUNDS = 12  # of levels' fitting
_MOST_BITS = 8
PASSES: tuple[tuple[int, ...], ...] = ((1, 4, 16), (2, 8, 24), (3, 8, 24), (2, 16))
"""Bytes a key of each pass; which of these a head takes is tried on the prompt's last queries."""
_OF_BUDGET = 0.16  # share of the bytes for each pass behind the first
_TRIED = 128


@dataclass(frozen=True, eq=False)
class Pass:
    """Keys in a few bits of some directions.

    Args:
        stored: bytes of a key.
        levels: values of each direction, ``[D, most levels]``; of one without bits, its mean.
        codes: of each key and direction, ``[n, D]`` uint8.
        bits: of each direction, ``[D]`` int64.
    """

    stored: int
    levels: Tensor
    codes: Tensor
    bits: Tensor

    @staticmethod
    def of(turned: Tensor, stored: int) -> Pass:
        """Divide bits among directions and fit their levels; keys ``[n, D]``."""
        import torch

        error, bits = turned.var(0), torch.zeros(turned.shape[1], dtype=torch.int64)
        for _ in range(8 * stored):  # the first bit of a normal number leaves 0.36 of its error
            at = int(error.masked_fill(bits.to(error.device) >= _MOST_BITS, -1).argmax())
            bits[at] += 1
            error[at] = error[at] / (4 if bits[at] > 1 else 2.75)
        levels = turned.new_zeros(turned.shape[1], 2 ** int(bits.max()))
        codes = torch.zeros(turned.shape, dtype=torch.uint8, device=turned.device)
        for at, count in enumerate(bits.tolist()):
            fitted = _levels(turned[:, at].contiguous(), 2**count)
            levels[at, : len(fitted)] = fitted
            codes[:, at] = _nearest_level(turned[:, at].contiguous(), fitted).to(torch.uint8)
        return Pass(stored, levels, codes, bits)

    def read(self) -> Tensor:
        """The keys as they are stored, ``[n, D]``."""
        return self.levels.T.gather(0, self.codes.long())

    @property
    def table_bytes(self) -> int:
        """Of the levels that are read once a search."""
        return int((2**self.bits).where(self.bits > 0, 0).sum()) * _NUMBER_BYTES


@dataclass(frozen=True, eq=False)
class CodeIndex:
    """Keys whole and in passes.

    Args:
        keys: ``[n, D]`` float32.
        asking: queries are turned by it to directions, ``[D, D]``.
        passes: of rising bytes a key.
    """

    keys: Tensor
    asking: Tensor
    passes: tuple[Pass, ...]

    @staticmethod
    def build(
        keys: Tensor, queries: Tensor, wanted: int, compared: int,
        choices: Sequence[Sequence[int]] = PASSES,
    ) -> CodeIndex:  # fmt: skip
        """Turn keys, store each in every pass, and take the passes that find most.

        Args:
            keys: ``[n, D]`` float32.
            queries: ``[m, D]`` float32, turned to where later ones will stand, in their order.
            wanted: keys that a search will name.
            compared: keys' worth of bytes that it may read.
            choices: bytes of each pass, of which the best by the last queries is taken.
        """
        import torch

        size, direction = torch.linalg.eigh(queries.T @ queries / len(queries))
        root = size.clamp_min(1e-6 * size.max()).sqrt()
        seen = keys @ (direction * root)
        _, across = torch.linalg.eigh(torch.cov(seen.T))
        turned, asking = seen @ across, (direction / root) @ across
        passes = {each: Pass.of(turned, each) for each in sorted({b for c in choices for b in c})}
        found = [CodeIndex(keys, asking, tuple(passes[b] for b in each)) for each in choices]
        return max(found, key=lambda index: index._found_of(queries[-_TRIED:], wanted, compared))

    def kept(self, compared: int) -> list[int]:
        """Keys that each pass ranks, and that are compared whole last."""
        whole = _NUMBER_BYTES * self.keys.shape[1]
        budget = compared * whole
        counts = [len(self.keys)]
        left = budget - sum(each.table_bytes for each in self.passes)
        left -= len(self.keys) * self.passes[0].stored
        for each in self.passes[1:]:
            counts.append(min(int(_OF_BUDGET * budget / each.stored), counts[-1]))
            left -= counts[-1] * each.stored
        return [*counts, min(max(int(left // whole), 0), counts[-1])]

    def search(self, queries: Tensor, wanted: int, compared: int) -> Tensor:
        """Keys of largest product with each query, among those compared, ``[q, w]``, best first.

        Args:
            queries: ``[q, D]``.
            wanted: keys to name, at most; fewer where fewer can be compared.
            compared: keys' worth of bytes that may be read.
        """
        import torch

        counts, asked = self.kept(compared), queries @ self.asking
        at = torch.arange(len(self.keys), device=queries.device).expand(len(queries), -1)
        for each, (_, following) in zip(self.passes, pairwise(counts), strict=True):
            worth = (asked @ each.read().T).gather(1, at)
            at = at.gather(1, worth.topk(following, -1).indices)
        exact = (queries @ self.keys.T).gather(1, at)
        return at.gather(1, exact.topk(min(wanted, at.shape[1]), -1).indices)

    def bytes_read(self, compared: int) -> int:
        """Of codes, levels and whole keys, by one search."""
        counts = self.kept(compared)
        whole = counts[-1] * _NUMBER_BYTES * self.keys.shape[1]
        stored = zip(self.passes, counts, strict=False)
        return whole + sum(each.table_bytes + n * each.stored for each, n in stored)

    def _found_of(self, queries: Tensor, wanted: int, compared: int) -> float:
        """The share of the keys of largest product that a search finds."""
        best = (queries @ self.keys.T).topk(min(wanted, len(self.keys)), -1).indices
        found = self.search(queries, wanted, compared)
        return float((best[:, :, None] == found[:, None]).any(-1).float().mean())


def _levels(values: Tensor, count: int) -> Tensor:
    """So many levels for some numbers, by Lloyd's rounds from their quantiles."""
    import torch

    levels = torch.quantile(values, (torch.arange(count, device=values.device) + 0.5) / count)
    for _ in range(_ROUNDS):
        at = _nearest_level(values, levels)
        sums = torch.zeros_like(levels).index_add_(0, at, values)
        sizes = torch.bincount(at, minlength=count)
        levels = torch.where(sizes > 0, sums / sizes.clamp_min(1), levels).sort().values
    return levels


def _nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    import torch

    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
