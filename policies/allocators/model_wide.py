"""One ranking for the whole model: layers and heads compete for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.allocator import Allocator, one_scoring_method
from kvtune.policies.method import Method
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ModelWide(Allocator):
    """The highest scores of all layers and heads win.

    Source: Kim et al., "KVzip", arXiv 2505.23416, 3.3, without a safeguard, as published. Meant
    for scores that are on one scale in all layers, as attention is. The uncompressed cache of all
    layers is held until the last one is known: no peak is saved.
    Cost: one ranking of L H P scores.
    """

    name = "model_wide"
    source = "Kim et al., NeurIPS 2025, arXiv 2505.23416"

    def check(self, methods: Sequence[Sequence[Method]]) -> None:
        """One scoring method."""
        one_scoring_method(self.name, "the model", [m for row in methods for m in row])

    def settle(
        self,
        budgets: NDArray[np.int64],
        methods: Sequence[Sequence[Method]],
        prompt: Callable[[int], Signals],
    ) -> NDArray[np.int64]:
        """How many winners each head has."""
        import numpy as np
        import torch

        method = one_scoring_method(self.name, "the model", [m for row in methods for m in row])
        ranked = torch.stack(
            [method.ranked(prompt(at), int(row.max())) for at, row in enumerate(budgets)]
        )
        order = ranked.flatten().argsort(descending=True, stable=True)[: int(budgets.sum())]
        won = (order // ranked.shape[-1]).bincount(minlength=budgets.size)
        return won.cpu().numpy().reshape(budgets.shape).astype(np.int64)
