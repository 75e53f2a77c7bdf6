"""What a head holds that goes on evicting while tokens are generated; runs without torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.option import ALL, Option


@dataclass(frozen=True)
class Room:
    """Entries of one head.

    Args:
        prompt: when the prompt is complete.
        budget: that may stay.
        most: at any time.
    """

    prompt: int
    budget: int
    most: int

    @staticmethod
    def of(option: Option, planned: int, prompt_tokens: int) -> Room | None:
        """Under a planned budget; None for a head that only grows."""
        method = option.method
        if not (isinstance(method, DecodeMethod) and goes_on_evicting(option)):
            return None
        held = min(planned, prompt_tokens) if method.trims_prompt else prompt_tokens
        budget = max(planned, beyond_prompt(option, prompt_tokens))
        return Room(held, budget, method.most(held, budget))


def goes_on_evicting(option: Option) -> bool:
    """Whether a head under this option can evict while tokens are generated."""
    return isinstance(option.method, DecodeMethod) and option.budget != ALL


def beyond_prompt(option: Option, prompt_tokens: int) -> int:
    """A budget that the prompt does not fill: an allocator has nothing to say about the rest."""
    tokens = option.budget.tokens or 0
    return tokens if tokens > prompt_tokens else 0
