"""Keys in a few bits, read pass by pass: all in very few, the likely ones in more, the best whole.

What counts of a key is what queries make of it. Keys are turned into directions that are scaled by
how much queries ask of them, and each pass gives its bits to the directions where an error would
cost products most. A search ranks all keys by the first pass, those that lead by the second, and so
on, and compares whole keys with what is left of the bytes that it may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PASSES = ((1, 6, 20), (2, 6, 20), (1, 4, 16))
"""Bytes of a key in each pass; a head takes what finds most for its prompt's queries."""
_TRIED = 128  # of those
_NUMBER_BYTES = 2  # of keys and of levels
_ROUNDS = 12  # of levels' fitting
_MOST_BITS = 8
_OTHERWISE = 0.1  # of the queries' mean power, taken to lie in any direction: answers ask otherwise
_OF_BUDGET = 0.16  # share of the bytes for each pass behind the first


@dataclass(frozen=True, eq=False)
class Pass:
    """Keys in a few bits of some directions.

    Args:
        packed: of each key, ``[n, bytes]`` uint8.
        fields: what each bit counts for in each direction's number, ``[8 bytes, D]``.
        levels: values of each direction by number, ``[most levels, D]``; its mean without bits.
        table_bytes: of the levels, that a search reads once.
    """

    packed: Tensor
    fields: Tensor
    levels: Tensor
    table_bytes: int

    @staticmethod
    def of(turned: Tensor, stored: int) -> Pass:
        """Divide the bits of so many bytes among directions of keys ``[n, D]``; fit levels."""
        import torch

        bits = _divided(turned.var(0), 8 * stored)
        levels = turned.new_zeros(2 ** max(bits), turned.shape[1])
        fields = turned.new_zeros(8 * stored, turned.shape[1])
        taken, planes = 0, []
        for count in range(1, max(bits) + 1):  # directions of equally many bits together
            at = [direction for direction, each in enumerate(bits) if each == count]
            if not at:
                continue
            fitted, number = _levels(turned[:, at].T.contiguous(), 2**count)
            levels[: 2**count, at] = fitted.T
            for bit in range(count):
                fields[range(taken, taken + len(at)), at] = 2.0**bit
                planes.append(number >> bit & 1)
                taken += len(at)
        eights = torch.cat(planes).T.unflatten(1, (stored, 8))
        packed = (eights << torch.arange(8, device=turned.device)).sum(-1).to(torch.uint8)
        return Pass(packed, fields, levels, sum(2**n for n in bits if n) * _NUMBER_BYTES)

    def read(self) -> Tensor:
        """The keys as they are stored, ``[n, D]``."""
        import torch

        bit = torch.arange(8, device=self.packed.device, dtype=torch.uint8)
        planes = (self.packed[:, :, None] >> bit & 1).flatten(1)
        return self.levels.gather(0, (planes.to(self.fields.dtype) @ self.fields).long())


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
        """Turn keys and store each in every pass, with the passes that find most.

        Args:
            keys: ``[n, D]`` float32.
            queries: ``[m, D]`` float32, turned to where later ones will stand.
            wanted: keys that a search will name.
            compared: keys' worth of bytes that it may read.
            choices: bytes of a key in each pass; no more than a byte a direction is used. A sample
                of the queries chooses.
        """
        import torch

        size, direction = torch.linalg.eigh(queries.T @ queries / len(queries))
        root = (size + _OTHERWISE * size.mean()).sqrt()
        seen = keys @ (direction * root)
        _, across = torch.linalg.eigh(torch.cov(seen.T))
        turned, asking = seen @ across, (direction / root) @ across
        choices = [sorted({min(each, keys.shape[1]) for each in choice}) for choice in choices]
        passes = {each: Pass.of(turned, each) for each in {b for c in choices for b in c}}
        found = [CodeIndex(keys, asking, tuple(passes[b] for b in each)) for each in choices]
        some = queries[:: max(len(queries) // _TRIED, 1)]
        return max(found, key=lambda index: index.share_found(some, wanted, compared))

    def share_found(self, queries: Tensor, wanted: int, compared: int) -> float:
        """Of the keys of largest product with each query, those that a search names."""
        best = (queries @ self.keys.T).topk(min(wanted, len(self.keys)), -1).indices
        found = self.search(queries, wanted, compared)
        return float((best[:, :, None] == found[:, None]).any(-1).float().mean())

    def ranked(self, compared: int) -> list[int]:
        """Keys that each pass ranks, and that are compared whole last."""
        whole = _NUMBER_BYTES * self.keys.shape[1]
        budget, counts = compared * whole, [len(self.keys)]
        left = budget - sum(each.table_bytes for each in self.passes)
        left -= self.passes[0].packed.nbytes
        for each in self.passes[1:]:
            stored = each.packed.shape[1]
            counts.append(min(int(_OF_BUDGET * budget / stored), counts[-1]))
            left -= counts[-1] * stored
        return [*counts, min(max(int(left // whole), 1), counts[-1])]

    def search(self, queries: Tensor, wanted: int, compared: int) -> Tensor:
        """Keys of largest product with each query, among those compared, ``[q, w]``, best first.

        Args:
            queries: ``[q, D]``.
            wanted: keys to name, at most; fewer where fewer can be compared.
            compared: keys' worth of bytes that may be read; passes take what they need, and one key
                is always compared.
        """
        import torch

        counts, asked = self.ranked(compared), queries @ self.asking
        at = torch.arange(len(self.keys), device=queries.device).expand(len(queries), -1)
        for each, (_, following) in zip(self.passes, pairwise(counts), strict=True):
            worth = (asked @ each.read().T).gather(1, at)
            at = at.gather(1, worth.topk(following, -1).indices)
        exact = (queries @ self.keys.T).gather(1, at)
        return at.gather(1, exact.topk(min(wanted, at.shape[1]), -1).indices)

    def bytes_read(self, compared: int) -> int:
        """Of packed keys, levels and whole keys, by one search."""
        *passes, whole = self.ranked(compared)
        stored = zip(self.passes, passes, strict=True)
        read = sum(each.table_bytes + count * each.packed.shape[1] for each, count in stored)
        return read + whole * _NUMBER_BYTES * self.keys.shape[1]


def _divided(variance: Tensor, bits: int) -> list[int]:
    """Bits of each direction: one after another to where the error is largest."""
    error, found = variance.tolist(), [0] * len(variance)
    for _ in range(bits):
        at = max(range(len(found)), key=lambda n: error[n] if found[n] < _MOST_BITS else -1)
        error[at] /= 4 if found[at] else 2.75  # of a normal number's
        found[at] += 1
    return found


def _levels(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """So many levels for each row's numbers, by Lloyd's rounds from quantiles, and the nearest.

    Args:
        values: ``[m, n]``.
        count: of levels.

    Returns:
        levels ``[m, count]``, rising, and the number of each value's nearest, ``[m, n]`` int64.
    """
    import torch

    place = (torch.arange(count, device=values.device) + 0.5) / count * (values.shape[1] - 1)
    levels = values.sort(-1).values[:, place.round().long()]
    for _ in range(_ROUNDS):
        at = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, values)
        sums = torch.zeros_like(levels).scatter_add_(1, at, values)
        sizes = torch.zeros_like(levels).scatter_add_(1, at, torch.ones_like(values))
        levels = torch.where(sizes > 0, sums / sizes.clamp_min(1), levels).sort(-1).values
    return levels, torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, values)
