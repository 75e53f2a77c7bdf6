"""How a policy's budgets are split over layers and heads, before or at the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvtune.policies.method import Method
from kvtune.policies.registry import find, registered
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "kvtune.policies.allocators"


@dataclass(frozen=True)
class Allocator:
    """Moves tokens between heads; what it is given in all, it gives back in all."""

    name: ClassVar[str]
    source: ClassVar[str]

    def plan(self, budgets: NDArray[np.int64], prompt_tokens: int) -> NDArray[np.int64]:
        """Budgets ``[L, H]`` in tokens, re-split when only the prompt's length is known."""
        return budgets

    def split(
        self, budgets: Sequence[int], methods: Sequence[Method], signals: Signals
    ) -> list[int]:
        """One layer's budgets ``[H]``, re-split when its prompt has been seen."""
        return list(budgets)


def find_allocator(name: str) -> type[Allocator]:
    """The allocator called ``name``."""
    return find(PACKAGE, Allocator, name)


def allocators() -> dict[str, type[Allocator]]:
    """Every allocator, by name."""
    return dict(registered(PACKAGE, Allocator))
