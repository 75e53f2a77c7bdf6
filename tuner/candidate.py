"""A trial's answer, the front of many of them, and the rule by which a search picks from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtune.common.estimate import Estimate
from kvtune.tuner.exchange import Choice


@dataclass(frozen=True)
class Candidate:
    """A configuration that a trial answered with, and what it is worth.

    Args:
        number: of the trial.
        parameters: what Optuna chose.
        choice: option of each head, ``[I]``.
        kl: predicted on the selection samples, nats/token.
        context: prompt tokens of each sequence.
        sequences: that fit at once.
        prompt_bytes: of one compressed prompt as formats count them, lengths included.
        excess: by which share of each limit it is beyond it; negative where it keeps to it.
        weights: format of the model's weights beside it.
        freed_bytes: that this format leaves beyond the widest one of the question.
        unseen: of a point of the front, loss on samples that the choice did not see.
    """

    number: int
    parameters: dict[str, Any]
    choice: Choice
    kl: float
    context: int
    sequences: int
    prompt_bytes: int
    excess: dict[str, float] = field(default_factory=dict)
    weights: str = ""
    freed_bytes: int = 0
    unseen: Estimate | None = None

    @property
    def believed(self) -> float:
        """Loss without the luck of being the best of many, where that is known, nats/token."""
        return self.kl if self.unseen is None else self.unseen.value

    @property
    def place(self) -> tuple[str, int]:
        """The format of the weights and the context: what memory is left depends on them."""
        return self.weights, self.context

    @property
    def misses(self) -> dict[str, float]:
        """The limits that it does not keep to, and by which share of each."""
        return {name: by for name, by in self.excess.items() if by > 0}

    @property
    def tokens_at_once(self) -> int:
        """Prompt tokens of all sequences together: what memory is spent on."""
        return self.context * self.sequences


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in both predicted loss and tokens at once, most last.

    Those of each format of the weights among themselves, the widest format first.
    """
    formats = sorted({candidate.freed_bytes for candidate in candidates})
    each = ([c for c in candidates if c.freed_bytes == freed] for freed in formats)
    return [candidate for one in each for candidate in _front(one)]


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.tokens_at_once, c.kl, c.number)):
        if not best or candidate.kl < best[-1].kl:
            best.append(candidate)
    return best[::-1]


def pick(front_: Sequence[Candidate], largest_kl: float) -> Candidate:
    """The candidate with most tokens at once within ``largest_kl``; else the least loss.

    Of several formats of the weights the widest in which there is one: what narrower ones lose is
    in no figure.
    """
    within = [candidate for candidate in front_ if candidate.believed <= largest_kl]
    if within:
        return min(within, key=lambda c: (c.freed_bytes, -c.tokens_at_once))
    return min(front_, key=lambda c: c.believed)
