"""Links between layers in a search: a pair of layers takes a linked option together, or neither.

A linked option of one head alone would store half of what nobody else has. So pairs of layers
choose first, each one option for all of its heads; where that is a linked one it stays, and the
heads of the other pairs then choose for themselves with the bytes that are left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.option import Option
from kvtune.tuner.allocate import Problem
from kvtune.tuner.exchange import Choice, exchange

PAIRS = "pairs"
"""The split in which layers may be linked; in others no head has a linked option."""

Solve = Callable[[Problem, Choice], Choice]
"""The best choice for a problem's heads, beside the options that the heads outside of it have."""


def is_linked(option: Option) -> bool:
    """Whether it stores something together with another layer."""
    return option.method.needs.linked


def holds_whole_prompt(option: Option) -> bool:
    """Whether a prompt's uncompressed cache is held until all layers have read it."""
    return option.method.needs.asks_model or is_linked(option)


def solve_pairs(
    problem: Problem, linked: NDArray[np.bool_], heads_of_pair: int, solve: Solve
) -> Choice:
    """Options of all heads, ``[I]``: linked in whole pairs of layers, else each head's own.

    Args:
        problem: every head and option; neighbouring heads, ``heads_of_pair`` of them, are a pair.
        linked: which options are links, ``[O]``.
        heads_of_pair: KV heads of two layers.
        solve: is called for the pairs, then for the heads that no link takes.

    Raises:
        KvtuneError: nothing fits.
    """
    nobody = np.zeros(0, np.int64)
    choice = np.repeat(solve(problem.tied(heads_of_pair), nobody), heads_of_pair)
    free, own = np.flatnonzero(~linked[choice]), np.flatnonzero(~linked)
    if len(free):
        rest = problem.beside(choice, free).allowing(own)
        choice[free] = own[solve(rest, choice[linked[choice]])]
    return choice


def exchange_unlinked(
    problem: Problem, linked: NDArray[np.bool_], budget: int, start: Choice, rounds: int
) -> Choice:
    """Trades of bytes between the heads that no link takes, while that lowers the loss, ``[I]``."""
    choice, free, own = start.copy(), np.flatnonzero(~linked[start]), np.flatnonzero(~linked)
    if len(free):
        rest = problem.beside(start, free).allowing(own)
        left = budget - problem.spent(start[linked[start]])
        choice[free] = own[exchange(rest, left, np.searchsorted(own, start[free]), rounds)]
    return choice
