"""One combination of card, weights, context, batch and policy, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.estimate import Estimate

if TYPE_CHECKING:
    from kvtune.profiles.gpus import GpuProfile
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.cost import Cost
    from kvtune.simulator.memory.plan import MemoryPlan
    from kvtune.simulator.memory.weights import WeightFormat

FULL = "full cache"
MILLION, SECONDS_PER_HOUR = 10**6, 3600


@dataclass(frozen=True)
class Card:
    """A card to estimate on.

    Args:
        gpu: its profile.
        memory_bytes: that may be used of it.
        price_per_hour: in any currency, or None.
    """

    gpu: GpuProfile
    memory_bytes: int
    price_per_hour: float | None


@dataclass(frozen=True)
class Split:
    """How cards are used together.

    Args:
        gpus: that share each layer of one copy of the model.
        copies: of the model, between which the sequences are dealt.
    """

    gpus: int = 1
    copies: int = 1

    @property
    def cards(self) -> int:
        """How many cards there are in all."""
        return self.gpus * self.copies

    def batch(self, sequences: int) -> int:
        """Sequences of the copy that is dealt the most."""
        return -(-sequences // self.copies)


ONE_CARD = Split()


@dataclass(frozen=True)
class Case:
    """One combination, and what it takes.

    Args:
        card: where it runs.
        context_tokens: prompt tokens of a sequence.
        batch: sequences at once, of all copies together.
        policy: name of the cache policy; ``full cache`` is the uncompressed one.
        budget: where one card's memory goes; None where not even the weights fit.
        cost: one card's memory, and one copy's time; None likewise.
        reason: why there is none.
        split: how many cards there are, and what they share.
        weights: format of the weights as it was asked for.
        engine_fits: whether an engine's own memory has room for all sequences; None where no
            engine was asked for, or what it takes is not known.
    """

    card: Card
    context_tokens: int
    batch: int
    policy: str
    budget: MemoryPlan | None
    cost: Cost | None
    reason: str = ""
    split: Split = ONE_CARD
    weights: str = "auto"
    engine_fits: bool | None = None

    @property
    def fits(self) -> bool:
        """Whether all sequences fit at once, by the engine where its memory is known."""
        if self.engine_fits is not None:
            return self.engine_fits
        return self.cost is not None and self.cost.sequences_that_fit >= self.split.batch(
            self.batch
        )

    def weight_format(self, shape: ModelShape) -> WeightFormat:
        """Of the budget; where there is none the one asked for, or the narrowest for ``auto``."""
        from kvtune.simulator.memory.weights import check_format, formats_by_width

        if self.budget is not None:
            return self.budget.weight_format
        if self.weights == "auto":
            return formats_by_width(shape, self.card.gpu)[-1]
        return check_format(self.weights)

    @property
    def sequences_that_fit(self) -> int | None:
        """At once, on all cards together."""
        return None if self.cost is None else self.cost.sequences_that_fit * self.split.copies

    @property
    def most_at_once(self) -> Estimate | None:
        """The same with its interval."""
        if self.cost is None:
            return None
        one, copies = self.cost.most_at_once, self.split.copies
        value, low, high = (copies * end for end in (one.value, one.low, one.high))
        return Estimate(value, low, high, one.unit, one.tier)

    @property
    def tokens_per_second(self) -> Estimate | None:
        """Tokens that all sequences together are given a second."""
        from kvtune.simulator.cost import per_second

        return per_second(self.cost.latency, self.batch) if self.cost else None

    @property
    def tokens_per_second_per_user(self) -> Estimate | None:
        """Tokens that each sequence is given a second."""
        from kvtune.simulator.cost import per_second

        return per_second(self.cost.latency, 1) if self.cost else None

    @property
    def cost_per_million_tokens(self) -> Estimate | None:
        """The cards' price over what they generate, in the price's currency; decoding alone."""
        rate, price = self.tokens_per_second, self.card.price_per_hour
        if rate is None or price is None:
            return None
        spent = price * self.split.cards * MILLION
        value, low, high = (
            spent / (SECONDS_PER_HOUR * end) for end in (rate.value, rate.high, rate.low)
        )
        return Estimate(value, low, high, "per million tokens", rate.tier)


def worth(cases: Sequence[Case]) -> tuple[bool, float, int]:
    """By which cards are sorted, from their cases of the full cache and the policy."""
    fitting = [case for case in cases if case.policy == cases[-1].policy and case.fits]
    costs = [case.cost_per_million_tokens for case in fitting]
    least = min((cost.value for cost in costs if cost), default=0.0)
    return not fitting, least, cases[0].card.memory_bytes
