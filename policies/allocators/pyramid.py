"""PyramidKV: more tokens in the lower layers, fewer in the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.allocator import Allocator
from kvtune.policies.registry import LONGEST_PROMPT, parameter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Layer budgets fall in a straight line with depth; the sum stays what it was.

    With ``floor: added``, every layer has the window, and of the rest the last layer gets
    ``mean / beta``, the first as much above the mean; no layer more than the prompt. Where the
    prompt is shorter than twice that mean, budgets stay as they are. With ``required`` the line is
    taken over whole budgets, and given up where it goes below the window.

    Source: Cai et al., "PyramidKV", arXiv 2406.02069, 3.2; beta 20 as published. ``added`` is the
    authors' code's rule when ``window`` is the method's (32 for snapkv), but for rounding, which
    hands out exactly the total (theirs keeps up to 12 % more tokens at small budgets); ``required``
    is kvpress's, which rounds each layer for itself. Without a window the last layers can be
    starved.
    Cost: none.
    """

    name = "pyramid"
    source = "Cai et al., arXiv 2406.02069"

    beta: float = parameter(20.0, "mean budget over the last layer's budget", low=1, high=1e6)
    window: int = parameter(
        0, "observation window of the method", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    floor: Literal["added", "required"] = parameter(
        "added", "whether each layer's window is added to the line or lies within it"
    )

    def plan(self, budgets: NDArray[np.int64], prompt_tokens: int) -> NDArray[np.int64]:
        """Weights on a line, times the heads' shares of their layer, rounded to the same sum."""
        import numpy as np

        window = self.window * budgets.shape[1]
        added = window if self.floor == "added" else 0
        mean = budgets.sum() / budgets.shape[0] - added
        if self.floor == "added" and prompt_tokens * budgets.shape[1] < 2 * mean:
            return budgets
        ceiling = max(prompt_tokens * budgets.shape[1] - window, 0)
        lowest = max(mean / self.beta, 2 * mean - ceiling)
        if not 0 <= lowest <= mean or lowest + added < window:
            return budgets
        layers = np.linspace(2 * mean - lowest, lowest, budgets.shape[0]) + added
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
