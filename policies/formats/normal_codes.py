"""Codes for numbers that are normally distributed: the levels that lose least (Lloyd and Max)."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EVEN = (
    (0.0, 1.0), (1.596, 0.3634), (0.9957, 0.1188), (0.5860, 0.03744), (0.3352, 0.01154),
    (0.1881, 0.003495), (0.1041, 0.001041),
)  # fmt: skip
"""By bits, the step of evenly spaced levels that loses least of a standard normal number, and its
mean squared error: to five bits from Max, "Quantizing for Minimum Distortion", 1960, table II."""

_ITERATIONS = 2000


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The ``2 ** bits`` levels of least squared error for a standard normal number, ascending.

    Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory, 1960: every
    level is the mean of what is nearest to it.
    """
    count = 2**bits
    found = [(2 * n + 1 - count) * 3 / count for n in range(count)]
    for _ in range(_ITERATIONS if bits else 0):
        ends = [-math.inf, *((a + b) / 2 for a, b in pairwise(found)), math.inf]
        found = [_mean_between(a, b) for a, b in pairwise(ends)]
    return tuple(found) if bits else (0.0,)


def magnitudes(bits: int) -> tuple[float, ...]:
    """The positive ones of the levels, ascending; the others are these below zero."""
    return levels(bits)[2 ** (bits - 1) :]


def nearest_codes(numbers: Tensor, bits: int) -> Tensor:
    """Codes of the nearest levels, int64: the sign above which of the magnitudes it is."""
    import torch

    some = torch.tensor(levels(bits), dtype=numbers.dtype, device=numbers.device)
    rank, half = torch.bucketize(numbers.contiguous(), (some[1:] + some[:-1]) / 2), 2 ** (bits - 1)
    return torch.where(rank >= half, rank - half, 2 * half - 1 - rank)


def _mean_between(low: float, high: float) -> float:
    return (_density(low) - _density(high)) / (_below(high) - _below(low))


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
