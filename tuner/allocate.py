"""Which option each KV head gets under a byte budget: coordinate descent under a byte price.

The loss is a quadratic form in the heads' choices (see ``simulator.tables``). Terms between heads
are shrunk: counted in full they over-fit the samples at tight budgets, left out they mis-rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Floats, Tables, low_rank

Choice = NDArray[np.int64]
_WHOLE = 2**40  # a budget, where two are mixed
_TOLERANCE = 1e-9  # nats/token: smaller gains are rounding


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

    def value(self, choice: Choice) -> float:
        """Loss of one configuration, ``[I]``, with shrunk cross terms, nats/token."""
        return float(score(self, choice[None])[0])

    def spent(self, choice: Choice) -> int:
        """Bytes of a configuration."""
        return int(self.footprint[choice].sum())


def score(problem: Problem, choices: Choice) -> Floats:
    """Losses of many configurations ``[B, I]`` at once, ``[B]`` nats/token.

    Head by head, so that what is gathered stays in the cache: a few microseconds each.
    """
    alone = problem.loss - problem.shrinkage * (problem.factor**2).sum(-1)
    own = np.zeros(len(choices), np.float32)
    total = np.zeros((len(choices), problem.factor.shape[-1]), np.float32)
    for head, picked in enumerate(np.ascontiguousarray(choices.T)):
        own += alone[head].take(picked)
        total += problem.factor[head].take(picked, 0)
    cross: Floats = np.einsum("br,br->b", total, total)
    return own + problem.shrinkage * cross


def solve(problem: Problem, budget: int) -> Choice:
    """The best configuration found within ``budget`` bytes, ``[I]``.

    A byte price is bisected with a few coordinate sweeps at each price; what is left of the
    budget is then spent, and bytes are traded between pairs of heads until no trade helps.

    Raises:
        KvtuneError: even the smallest options take more.
    """
    cheapest = int(problem.footprint.min()) * len(problem.loss)
    if cheapest > budget:
        raise KvtuneError(
            f"{budget} bytes are less than the smallest options take together ({cheapest})",
            hint="raise --mem, shorten --context or lower --batch.",
        )
    start, price = priced(problem, budget)
    if problem.shrinkage:
        start = _descend_price(problem, budget, start, price)
    return exchange(problem, budget, start)


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


def priced(problem: Problem, budget: int) -> tuple[Choice, float]:
    """Each head alone: least loss + price * bytes, the price bisected to the budget.

    This is greedy allocation on each head's lower convex hull, optimal for additive losses up to
    one hull step. Returns the configuration and its price in nats/token a byte.
    """
    high = float(np.ptp(problem.loss)) + _TOLERANCE  # a byte saved is worth any loss
    low = high * 1e-18
    choice = np.full(len(problem.loss), problem.footprint.argmin())
    for _ in range(64):
        price = float(np.sqrt(low * high))
        tried = (problem.loss + price * problem.footprint).argmin(1)
        if problem.spent(tried) <= budget:
            choice, high = tried, price
        else:
            low = price
    return choice, high


def _descend_price(problem: Problem, budget: int, start: Choice, price: float) -> Choice:
    """Bisect the price again around ``price``, now with cross terms, warm from what was found."""
    best, best_value = start, problem.value(start)
    low, high = price / 16, price * 16
    current = start
    for _ in range(14):
        price = float(np.sqrt(low * high))
        current = _sweeps(problem, price, current)
        if problem.spent(current) > budget:
            low = price
            continue
        high = price
        if (value := problem.value(current)) < best_value:
            best, best_value = current.copy(), value
    return best


def _sweeps(problem: Problem, price: float, start: Choice, rounds: int = 3) -> Choice:
    """Coordinate descent at a fixed price: every head in turn takes its best option."""
    choice = start.copy()
    head = np.arange(len(choice))
    total = problem.factor[head, choice].sum(0)
    base = problem.loss + price * problem.footprint
    for _ in range(rounds):
        changed = False
        for i in head:
            factor = problem.factor[i]
            others = total - factor[choice[i]]
            best = int((base[i] + 2 * problem.shrinkage * (factor @ others)).argmin())
            changed |= best != choice[i]
            total = others + factor[best]
            choice[i] = best
        if not changed:
            break
    return choice


def exchange(problem: Problem, budget: int, start: Choice, rounds: int = 400) -> Choice:
    """Spend what is left, then trade bytes between pairs of heads while that lowers the loss."""
    choice = start.copy()
    for _ in range(rounds):
        gain, spend, step = _moves(problem, choice)
        slack = budget - problem.spent(choice)
        moves = _best_single(gain, spend, slack) or _best_pair(problem, gain, spend, step, slack)
        if not moves:
            break
        for head, option in moves:
            choice[head] = option
    return choice


def _moves(problem: Problem, choice: Choice) -> tuple[Floats, NDArray[np.int64], Floats]:
    """What each single change would do: loss ``[I, O]``, bytes ``[I, O]``, factor ``[I, O, r]``."""
    head = np.arange(len(choice))
    now = problem.factor[head, choice]
    others = now.sum(0) - now
    step = problem.factor - now[:, None]
    gain = problem.loss - problem.loss[head, choice][:, None]
    gain = gain + 2 * problem.shrinkage * np.einsum("ior,ir->io", step, others)
    return gain, problem.footprint - problem.footprint[choice][:, None], step


def _best_single(gain: Floats, spend: NDArray[np.int64], slack: int) -> list[tuple[int, int]]:
    allowed = np.where(spend <= slack, gain, np.inf)
    head, option = np.unravel_index(int(allowed.argmin()), gain.shape)
    return [(int(head), int(option))] if allowed[head, option] < -_TOLERANCE else []


def _best_pair(
    problem: Problem,
    gain: Floats,
    spend: NDArray[np.int64],
    step: Floats,
    slack: int,
    keep: int = 64,
) -> list[tuple[int, int]]:
    """One head gives bytes up, another takes them; screened without, ranked with, their product."""
    options = gain.shape[1]
    flat_gain, flat_spend = gain.ravel(), spend.ravel()
    takes = np.flatnonzero((flat_gain < -_TOLERANCE) & (flat_spend > slack))
    gives = np.flatnonzero(flat_spend < 0)
    if not len(takes) or not len(gives):
        return []
    gives = gives[np.argsort(flat_spend[gives], kind="stable")]  # most bytes freed first
    cheapest = np.minimum.accumulate(flat_gain[gives])
    argmin = np.maximum.accumulate(np.where(flat_gain[gives] == cheapest, np.arange(len(gives)), 0))
    reach = np.searchsorted(flat_spend[gives], slack - flat_spend[takes], side="right") - 1
    takes, reach = takes[reach >= 0], reach[reach >= 0]
    if not len(takes):
        return []
    partner = gives[argmin[reach]]
    order = np.argsort(flat_gain[takes] + flat_gain[partner])[:keep]
    take, give = takes[order], partner[order]
    flat_step = step.reshape(-1, step.shape[-1])
    together = flat_gain[take] + flat_gain[give]
    together = together + 2 * problem.shrinkage * (flat_step[take] * flat_step[give]).sum(-1)
    together[take // options == give // options] = np.inf
    best = int(together.argmin())
    if together[best] >= -_TOLERANCE:
        return []
    return [divmod(int(take[best]), options), divmod(int(give[best]), options)]
