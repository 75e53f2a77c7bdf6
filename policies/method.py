"""What becomes of a KV head's prompt: the contract of a method, and of those that score tokens.

Life of a method: it is built from published hyper-parameters (a frozen dataclass); the driver,
``policies/apply.py``, gathers what ``needs`` names and calls ``parts`` once a layer, when the
prompt is complete. Most methods only drop tokens: they say which stay in ``keep``, and a few write
what they drop into what they keep in ``merge``. Others override ``parts`` and say in ``plan`` how
large those will be; a method that keeps much and reads little also names a ``reader``. A method
only chooses. Gathering, storing, attending, counting bytes and checking are shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.reader import Reader
from kvtune.policies.registry import find, registered
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work, work_of_choice, work_of_signals

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "kvtune.policies.methods"
Shape = Literal["window", "sinks+window", "scored"]
"""Which tokens stay where not all do: the newest; the first ``sinks`` and the newest; those of
highest score, which no fixed pattern can stand for."""


@dataclass(frozen=True)
class Method(ABC):
    """Chooses which prompt tokens stay.

    ``heads_are_alike`` says that a head's choice does not depend on its number: permuting the
    heads permutes the choice. ``looks_ahead`` marks references that see the observed tokens.
    ``shape`` is what an exporter may rely on; a method of ``sinks+window`` has a field ``sinks``.
    ``stores_whole_prompts_alike`` says that a prompt that stays whole takes no more pages than as
    many tokens of a longer one: where it may, budgets get no floor (``Option.with_floor``).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    heads_are_alike: ClassVar[bool] = True
    shape: ClassVar[Shape] = "scored"
    stores_whole_prompts_alike: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Its name and what differs from the published parameters: ``h2o(recent_share=0.1)``."""
        own = [
            f"{each.name}={getattr(self, each.name)}"
            for each in fields(self)
            if getattr(self, each.name) != each.default
        ]
        return f"{self.name}({', '.join(own)})" if own else self.name

    @property
    def looks_across_heads(self) -> bool:
        """Whether a head's choice depends on other heads; if not, prompts may be asked as heads."""
        return False

    @property
    def chooses_head_by_head(self) -> bool:
        """Whether no head's choice depends on other heads, or on which head it is."""
        return self.heads_are_alike and not self.looks_across_heads

    @property
    def only_drops(self) -> bool:
        """Whether every token that it keeps is stored with that token's own key and value."""
        return type(self).merge is Method.merge and type(self).parts is Method.parts

    @property
    def looks_ahead(self) -> bool:
        """Whether it reads what no server could: a bound for others, not a policy to serve."""
        return self.needs.future or self.needs.probes

    @property
    def needs(self) -> Needs:
        """The signals that ``keep`` reads."""
        return Needs()

    @abstractmethod
    def keep(self, signals: Signals, budget: int) -> Tensor:
        """Token indices to keep, ``[H, min(budget, P)]`` int64, ascending; changes nothing.

        Safe with a budget of 0 or beyond the prompt.
        """

    def merge(self, signals: Signals, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values to store instead of the kept tokens' own; None keeps them as they are.

        Args:
            signals: as ``keep`` was given them.
            kept: what ``keep`` returned, ``[H, n]``.

        Returns:
            Keys and values ``[H, n, D]`` in the dtypes of the signals'.
        """
        return None

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """What is stored of a layer's prompt; changes nothing. Sizes are those of ``plan``.

        Unless overridden, one part: the tokens that ``keep`` names, as ``merge`` leaves them.
        """
        kept = self.keep(signals, budget)
        return [Part(kept, *(self.merge(signals, kept) or (None, None)))]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """The sizes of ``parts``, before the prompt has been read; runs without torch."""
        return (PartPlan(min(budget, prompt_tokens)),)

    def reader(self, budget: int) -> Reader | None:
        """Selects what each step reads of what is held; None where all is read."""
        return None

    def linked_layer(self, layer: int, layers: int) -> int | None:
        """Another layer whose keys and values ``parts`` reads; None where a layer is alone."""
        return None

    def work(self, shape: LayerShape, budget: int) -> Work:
        """What one layer's choice costs beside the prompt's own pass: signals, ranking, moving."""
        return work_of_signals(self.needs, shape) + work_of_choice(shape, budget)


@dataclass(frozen=True)
class ScoredMethod(Method):
    """Keeps the tokens of highest score, after those protected by their place."""

    @abstractmethod
    def scores(self, signals: Signals) -> Tensor:
        """How much each token is worth to each KV head, ``[H, P]`` float32, finite."""

    def protected(self, budget: int) -> tuple[int, int]:
        """How many tokens at the prompt's start and at its end are kept whatever their score."""
        return 0, 0

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The protected tokens, then the highest scores; of equal scores the more recent token.

        Where all of them may stay, nobody is ranked.
        """
        import torch

        heads, tokens, _ = signals.keys.shape
        if budget >= tokens:
            return torch.arange(tokens, device=signals.keys.device).expand(heads, -1)
        return self._best_first(signals, budget)[:, :budget].sort(-1).values

    def _best_first(self, signals: Signals, budget: int) -> Tensor:
        """Tokens by their worth, ``[H, P]``; budgets that protect as many share one sorting."""

        def sort() -> Tensor:
            newest_first = self.ranked(signals, budget).flip(-1)
            best = newest_first.argsort(dim=-1, descending=True, stable=True)
            return signals.prompt_tokens - 1 - best

        first, last = self.protected_within(budget)
        return signals.once(f"{self!r}, best first, protected {first} and {last}", sort)

    def ranked(self, signals: Signals, budget: int) -> Tensor:
        """A copy of the scores, ``[H, P]``, the protected tokens at infinity."""
        scores = self.scores_once(signals)
        first, last = self.protected_within(budget)
        ranked = scores.clone()
        ranked[:, :first] = float("inf")
        ranked[:, scores.shape[-1] - last :] = float("inf")
        return ranked

    def scores_once(self, signals: Signals) -> Tensor:
        """The scores, computed at the first asking; not to be changed."""
        return signals.once(repr(self), partial(self.scores, signals))

    @property
    def ranks_alone(self) -> bool:
        """Whether scores and protected places say all, so that ``ragged.keep_each`` may choose."""
        own = type(self)
        return self.only_drops and own.keep is ScoredMethod.keep and own.plan is Method.plan

    def protected_within(self, budget: int) -> tuple[int, int]:
        """The same as ``protected``, as far as the budget goes."""
        first, last = self.protected(budget)
        first = min(first, budget)
        return first, min(last, budget - first)


@dataclass(frozen=True)
class ReadingMethod(Method):
    """Holds every token; the budget is how many of them a step reads."""

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """Every token is held."""
        import torch

        heads, tokens, _ = signals.keys.shape
        return torch.arange(tokens, device=signals.keys.device).expand(heads, -1)

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """One part of all tokens, whatever a step reads of them."""
        return (PartPlan(prompt_tokens),)

    @abstractmethod
    def reader(self, budget: int) -> Reader:
        """Selects as many tokens as the budget, one at least."""


def find_method(name: str) -> type[Method]:
    """The method called ``name``."""
    return find(PACKAGE, Method, name)  # type: ignore[type-abstract]


def methods() -> dict[str, type[Method]]:
    """Every method, by name."""
    return dict(registered(PACKAGE, Method))
