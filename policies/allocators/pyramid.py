"""PyramidKV: more tokens in the lower layers, fewer in the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.allocator import Allocator
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Layer budgets fall in a straight line with depth; the sum stays what it was.

    The last layer gets ``mean / beta``, the first as much above the mean; no layer more than the
    prompt but for the window.

    Source: Cai et al., "PyramidKV", arXiv 2406.02069, 3.2; beta 20 as published. Differs from the
    authors' code: rounding hands out exactly the total (theirs keeps up to 12 % more tokens at
    small budgets), and the line is taken over whole budgets, the observation window included
    (theirs adds it to every layer). kvpress too takes the line over whole budgets, rounds each
    layer for itself, and falls back to uniform budgets where the last layer would get less than
    the window: ``window: 64`` does the latter.
    Cost: none.
    """

    name = "pyramid"
    source = "Cai et al., arXiv 2406.02069"

    beta: float = parameter(20.0, "mean budget over the last layer's budget", low=1)
    window: int = parameter(
        0, "observation window that no layer may get less than", unit="tokens", low=0
    )

    def plan(self, budgets: NDArray[np.int64], prompt_tokens: int) -> NDArray[np.int64]:
        """Weights on a line, times the heads' shares of their layer, rounded to the same sum."""
        import numpy as np

        mean = budgets.sum() / budgets.shape[0]
        heads = budgets.shape[1]
        ceiling = max(prompt_tokens - self.window, 0) * heads
        lowest = max(mean / self.beta, 2 * mean - ceiling)
        if lowest > mean or lowest < self.window * heads:
            return budgets
        layers = np.linspace(2 * mean - lowest, lowest, budgets.shape[0])
        shares = budgets / np.maximum(budgets.sum(1, keepdims=True), 1)
        return round_to_sum(layers[:, None] * shares, int(budgets.sum()), prompt_tokens)


def round_to_sum(wanted: NDArray[np.float64], total: int, ceiling: int) -> NDArray[np.int64]:
    """Integers nearest to ``wanted`` below ``ceiling`` that add up to ``total`` (largest rests)."""
    import numpy as np

    wanted = np.clip(wanted, 0, ceiling)
    whole = np.floor(wanted).astype(np.int64)
    by_rest = np.argsort(-(wanted - whole), axis=None, kind="stable")
    while (missing := total - int(whole.sum())) > 0:
        room = by_rest[whole.flat[by_rest] < ceiling][:missing]
        if room.size == 0:
            break
        whole.flat[room] += 1
    return whole
