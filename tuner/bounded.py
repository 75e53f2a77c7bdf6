"""Branch and bound over allocations: the exact optimum where few enough configurations are left.

The loss of a configuration is ``sum(own) + s * |sum(factor)|^2``. The square is convex, so that for
any vector ``g`` it is at least ``2 g . sum(factor) - |g|^2``; and where bytes have a price, what a
configuration does not spend of its budget only lowers the bound. Both make the bound a sum over
heads. An option whose share of that sum is further above its head's smallest than the gap between
the bound and a known configuration cannot be part of anything better, nor can any set of options
that are so together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvtune.simulator.quality.tables import Floats
from kvtune.tuner.exchange import TOLERANCE, Choice

if TYPE_CHECKING:
    from kvtune.tuner.allocate import Problem

_MOST = 200_000  # partial configurations side by side
_STEPS = 60
_ROUNDING = 1e-5  # of the loss: what single precision may be off


def optimum(problem: Problem, budget: int, known: Choice) -> Choice | None:
    """The best configuration within ``budget``; None where too many are left to look at.

    Args:
        problem: its footprints may differ by option, not by head.
        budget: bytes.
        known: a configuration that fits; the better it is, the fewer others are looked at.
    """
    best = problem.value(known)
    terms, bound = _bound(problem, budget, best)
    excess = terms - terms.min(1, keepdims=True)
    left = _completed(problem, budget, excess, best - bound + _ROUNDING * abs(best) + TOLERANCE)
    if left is None:
        return None
    if not len(left):
        return known
    values = problem.values(left)
    row = int(values.argmin())
    return left[row] if values[row] < best else known


def _bound(problem: Problem, budget: int, best: float) -> tuple[Floats, float]:
    """The terms ``[I, O]`` whose smallest add up to the largest bound found, and that bound.

    Args:
        problem: of the loss.
        budget: bytes.
        best: a loss that is known; steps are as long as the way to it (Polyak).
    """
    factor, footprint = problem.factor.astype(float), problem.footprint / max(budget, 1)
    square = problem.shrinkage * (factor**2).sum(-1)
    own, heads = problem.loss - square, np.arange(len(factor))
    vector, price = np.zeros(factor.shape[-1]), 0.0
    found: tuple[Floats, float] = (own, -np.inf)
    for _ in range(_STEPS):
        terms = own + 2 * problem.shrinkage * (factor @ vector) + price * footprint
        bound = terms.min(1).sum() - price - problem.shrinkage * float(vector @ vector)
        if bound > found[1]:
            found = terms, float(bound)
        picked = terms.argmin(1)
        toward = 2 * problem.shrinkage * (factor[heads, picked].sum(0) - vector)
        over = footprint[picked].sum() - 1.0
        length = (best - bound) / (toward @ toward + over**2 + 1e-30)
        vector, price = vector + length * toward, max(0.0, price + length * over)
    return found


def _completed(problem: Problem, budget: int, excess: Floats, gap: float) -> Choice | None:
    """All configurations that fit and whose excess is within ``gap``, ``[B, I]``; None of many."""
    order = np.argsort((excess <= gap).sum(1), kind="stable")  # heads with few options first
    cheapest = int(problem.footprint.min())
    rows = np.zeros((1, len(excess)), np.int64)
    above, spent = np.zeros(1), np.zeros(1, np.int64)
    for done, head in enumerate(order, 1):
        options = np.flatnonzero(excess[head] <= gap)
        if len(rows) * len(options) > 4 * _MOST:
            return None
        above = (above[:, None] + excess[head, options]).ravel()
        spent = (spent[:, None] + problem.footprint[options]).ravel()
        fits = spent + cheapest * (len(excess) - done) <= budget
        kept = np.flatnonzero((above <= gap) & fits)
        if len(kept) > _MOST:
            return None
        rows = rows[kept // len(options)]
        rows[:, head] = options[kept % len(options)]
        above, spent = above[kept], spent[kept]
    return rows
