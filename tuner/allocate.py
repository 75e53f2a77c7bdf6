"""Which option each KV head gets under a byte budget: a byte price, then trades between heads.

The loss is a quadratic form in the heads' choices (see ``simulator.tables``). Terms between heads
are shrunk: counted in full they over-fit the samples at tight budgets, left out they mis-rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Floats, Tables, low_rank
from kvtune.tuner.bounded import optimum
from kvtune.tuner.exchange import TOLERANCE, Choice, exchange, is_small, restarted

_PIECE = 2048  # configurations scored by one thread at a time
_WHOLE = 2**40  # a budget, where two are mixed


@dataclass(frozen=True)
class Problem:
    """Heads, what each may choose, what that loses and what it takes.

    Args:
        loss: own terms, ``[I, O]`` nats/token.
        factor: ``[I, O, r]``; its products between heads are the cross terms.
        footprint: bytes, ``[O]``.
        read: bytes that a decode step reads of those, ``[O]``; None where nobody asks.
        shrinkage: share of the cross terms that counts, 0 to 1.
    """

    loss: Floats
    factor: Floats
    footprint: NDArray[np.int64]
    shrinkage: float = 0.4
    read: NDArray[np.int64] | None = None

    @staticmethod
    def of(
        tables: Tables,
        footprint: NDArray[np.int64],
        *,
        shrinkage: float = 0.4,
        rank: int = 64,
        emphasis: Mapping[str, float] | None = None,
    ) -> Problem:
        """The mean over the tables' samples, each kind of text counting alike but for emphasis."""
        weights = tables.sample_weights(emphasis)
        grouped = np.bincount(tables.group, weights=weights).astype(np.float32)
        loss = np.einsum("n,nio->io", weights, tables.loss)
        factor = low_rank(tables.factor, rank, grouped)
        return Problem(loss, factor, footprint, shrinkage)

    def allowing(self, columns: Sequence[int] | NDArray[np.bool_ | np.integer]) -> Problem:
        """The same heads with fewer options."""
        return replace(
            self,
            loss=self.loss[:, columns],
            factor=np.ascontiguousarray(self.factor[:, columns]),
            footprint=self.footprint[columns],
            read=None if self.read is None else self.read[columns],
        )

    def shrunk(self, shrinkage: float) -> Problem:
        """The same problem with another share of its cross terms."""
        return replace(self, shrinkage=shrinkage)

    def tied(self, size: int) -> Problem:
        """Neighbouring heads, ``size`` of them (a layer's), must choose alike."""
        factor = self.factor.reshape(-1, size, *self.factor.shape[1:]).sum(1)
        apart = (self.factor**2).sum(-1).reshape(-1, size, self.loss.shape[1]).sum(1)
        within = (factor**2).sum(-1) - apart
        own = self.loss.reshape(-1, size, self.loss.shape[1]).sum(1) + self.shrinkage * within
        read = None if self.read is None else self.read * size
        return replace(self, loss=own, factor=factor, footprint=self.footprint * size, read=read)

    def beside(self, choice: Choice, free: NDArray[np.int64]) -> Problem:
        """The problem of some heads, ``free``, where all others have chosen, ``[I]``.

        What it loses is what the whole configuration loses, but for a constant.
        """
        taken = np.setdiff1d(np.arange(len(choice)), free)
        others = self.factor[taken, choice[taken]].sum(0)
        loss = self.loss[free] + 2 * self.shrinkage * (self.factor[free] @ others)
        return replace(self, loss=loss, factor=np.ascontiguousarray(self.factor[free]))

    def value(self, choice: Choice) -> float:
        """Loss of one configuration, ``[I]``, with shrunk cross terms, nats/token."""
        return float(self.values(choice[None])[0])

    def values(self, choices: Choice) -> Floats:
        """Losses of many configurations ``[B, I]`` at once, ``[B]`` nats/token.

        Head by head, so that what is gathered stays in the cache; thousands side by side on all
        cores.
        """
        alone = self.loss - self.shrinkage * (self.factor**2).sum(-1)
        pieces = [choices[at : at + _PIECE] for at in range(0, len(choices), _PIECE)]
        if len(pieces) < 2:
            return _score(self, alone, choices)
        workers = min(len(pieces), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as threads:  # NumPy gathers without the GIL
            found = threads.map(lambda each: _score(self, alone, each), pieces)
            return np.concatenate(list(found))

    def spent(self, choice: Choice) -> int:
        """Bytes of a configuration."""
        return int(self.footprint[choice].sum())


def _score(problem: Problem, alone: Floats, choices: Choice) -> Floats:
    own = np.zeros(len(choices), np.float32)
    total = np.zeros((len(choices), problem.factor.shape[-1]), np.float32)
    for head, picked in enumerate(np.ascontiguousarray(choices.T)):
        own += alone[head].take(picked)
        total += problem.factor[head].take(picked, 0)
    cross: Floats = np.einsum("br,br->b", total, total)
    return own + problem.shrinkage * cross


def solve(problem: Problem, budget: int) -> Choice:
    """The best configuration found within ``budget`` bytes, ``[I]``.

    A byte price is bisected on each head alone; what is left of the budget is then spent, and bytes
    are traded between pairs of heads until no trade helps. In a small problem branch and bound then
    gives the optimum; where too many configurations could still be better for that, a few heads at
    a time are thrown about and traded again, and what is better stays.

    Raises:
        KvtuneError: even the smallest options take more.
    """
    cheapest = int(problem.footprint.min()) * len(problem.loss)
    if cheapest > budget:
        raise KvtuneError(
            f"{budget} bytes are less than the smallest options take together ({cheapest})",
            hint="raise --mem, shorten --context or lower --batch.",
        )
    found = exchange(problem, budget, priced(problem, budget))
    best = optimum(problem, budget, found) if is_small(problem) else None
    return restarted(problem, budget, found) if best is None else best


def solve_both(problem: Problem, budget: int, read_budget: int) -> Choice:
    """The best found within ``budget`` bytes held and ``read_budget`` bytes read a step, ``[I]``.

    Both are one price: a mix of the two shares of their budgets, whose weight is bisected. A mix
    that is kept to may break one of the two; it is then tightened until it does not.

    Raises:
        KvtuneError: no options keep to both.
    """
    read = problem.footprint if problem.read is None else problem.read
    choice = solve(problem, budget)
    if int(read[choice].sum()) <= read_budget:
        return choice
    found: list[Choice] = []
    for room in (1.0, 0.98, 0.95, 0.9, 0.8, 0.6):
        low, high = 0.0, 1.0
        for _ in range(8):
            weight = (low + high) / 2
            mixed = (1 - weight) * problem.footprint / budget + weight * read / max(read_budget, 1)
            priced_as_one = replace(problem, footprint=np.ceil(mixed * _WHOLE).astype(np.int64))
            try:
                choice = solve(priced_as_one, int(room * _WHOLE))
            except KvtuneError:
                break
            reads_too_much = int(read[choice].sum()) > read_budget
            if not reads_too_much and problem.spent(choice) <= budget:
                found.append(choice)
            low, high = (weight, high) if reads_too_much else (low, weight)
        if found:
            return min(found, key=problem.value)
    raise KvtuneError(
        f"no options keep to {budget} bytes held and {read_budget} bytes read",
        hint="raise --read-bytes or --mem, or shorten --context.",
    )


def priced(problem: Problem, budget: int) -> Choice:
    """Each head alone: least loss + price * bytes, the price bisected to the budget.

    This is greedy allocation on each head's lower convex hull, optimal for additive losses up to
    one hull step.
    """
    high = float(np.ptp(problem.loss)) + TOLERANCE  # a byte saved is worth any loss
    low = high * 1e-18
    choice = np.full(len(problem.loss), problem.footprint.argmin())
    for _ in range(64):
        price = float(np.sqrt(low * high))
        tried = (problem.loss + price * problem.footprint).argmin(1)
        if problem.spent(tried) <= budget:
            choice, high = tried, price
        else:
            low = price
    return choice
