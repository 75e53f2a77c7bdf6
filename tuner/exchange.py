"""Local search over allocations: trades of bytes between heads, and restarts from near by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.simulator.quality.tables import Floats

if TYPE_CHECKING:
    from kvtune.tuner.allocate import Problem

Choice = NDArray[np.int64]
TOLERANCE = 1e-9  # nats/token: smaller gains are rounding
_THROWN = (2, 3, 4)  # heads at a time
_WORK, _MOST = 60_000, 200


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


def is_small(problem: Problem) -> bool:
    """Whether there is time to look beyond the first answer."""
    return problem.factor.size <= _WORK


def restarted(problem: Problem, budget: int, start: Choice) -> Choice:
    """The best of ``start`` and of what trading finds from where a few heads were thrown about.

    Trades of pairs end where no pair helps; three heads that must change together are beyond them.
    Small problems alone are tried again: on the tables of a whole model it fits the search samples
    better and loses no less on others (``benchmarks/results/allocation-cpu.json``).
    """
    rng = np.random.default_rng(0)
    best, least = start, problem.value(start)
    for number in range(min(_WORK // problem.factor.size, _MOST)):
        thrown = _thrown(problem, budget, best, rng, _THROWN[number % len(_THROWN)])
        found = exchange(problem, budget, thrown)
        if (value := problem.value(found)) < least - TOLERANCE:
            best, least = found, value
    return best


def _thrown(
    problem: Problem, budget: int, start: Choice, rng: np.random.Generator, count: int
) -> Choice:
    """Some heads with options drawn at random; others give up theirs until the budget is kept."""
    choice = start.copy()
    order = rng.permutation(len(choice))
    choice[order[:count]] = rng.integers(0, problem.loss.shape[1], len(order[:count]))
    smallest = int(problem.footprint.argmin())
    for head in order[::-1]:
        if problem.spent(choice) <= budget:
            break
        choice[head] = smallest
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
    return [(int(head), int(option))] if allowed[head, option] < -TOLERANCE else []


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
    takes = np.flatnonzero((flat_gain < -TOLERANCE) & (flat_spend > slack))
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
    if together[best] >= -TOLERANCE:
        return []
    return [divmod(int(take[best]), options), divmod(int(give[best]), options)]
