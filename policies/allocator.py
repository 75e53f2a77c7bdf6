"""How a policy's budgets are split over layers and heads, before or at the end of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvtune.common.errors import KvtuneError
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.registry import registered
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "kvtune.policies.allocators"


@dataclass(frozen=True)
class Allocator:
    """Moves tokens between heads; what it is given in all, it gives back in all.

    Called in this order: ``plan`` before the prompt, ``settle`` when the whole model has seen it,
    ``split`` layer by layer as it is compressed.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """The signals that it reads itself, beside what the methods need."""
        return Needs()

    def check(self, methods: Sequence[Sequence[Method]]) -> None:
        """Refuse methods ``[L][H]`` that it cannot split budgets between; most take any.

        Raises:
            KvtuneError: what it needs, and what to do.
        """

    def plan(self, budgets: NDArray[np.int64], prompt_tokens: int) -> NDArray[np.int64]:
        """Budgets ``[L, H]`` in tokens, re-split when only the prompt's length is known."""
        return budgets

    def settle(
        self,
        budgets: NDArray[np.int64],
        methods: Sequence[Sequence[Method]],
        prompt: Callable[[int], Signals],
    ) -> NDArray[np.int64]:
        """Budgets ``[L, H]``, re-split over the whole model when all of its prompt has been seen.

        Args:
            budgets: as planned.
            methods: of every head, ``[L][H]``.
            prompt: gives a layer's signals; asked only by those that compare layers.
        """
        return budgets

    def split(
        self, budgets: Sequence[int], methods: Sequence[Method], signals: Signals
    ) -> list[int]:
        """One layer's budgets ``[H]``, re-split when its prompt has been seen."""
        return list(budgets)


def one_scoring_method(allocator: str, of: str, methods: Sequence[Method]) -> ScoredMethod:
    """The method of all these heads, which must be one and score tokens by what they hold.

    Args:
        allocator: its name, for the error.
        of: what shares the method: a layer, or the model.
        methods: of the heads.

    Raises:
        KvtuneError: several methods, or one that has no scores to compare.
    """
    method = methods[0]
    if not isinstance(method, ScoredMethod) or method.shape != "scored" or set(methods) != {method}:
        names = ", ".join(dict.fromkeys(each.name for each in methods))
        raise KvtuneError(
            f"{allocator} compares the scores of tokens and needs one scoring method for {of}, "
            f"not {names}",
            hint=f"give all heads of {of} the same method, for example snapkv or kvzip.",
        )
    return method


def allocators() -> dict[str, type[Allocator]]:
    """Every allocator, by name."""
    return dict(registered(PACKAGE, Allocator))
