"""Fills one option for all heads to the bytes that each sequence has, to the token of a head."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.format import Format
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.tuner.question import Question

SequenceBytes = Callable[[Policy, int], int]
"""Device memory of one sequence under a policy, its prompt so long."""


def held_by_runtime(head_dim: int, generated_tokens: int) -> SequenceBytes:
    """As the runtime reserves it, with a page more a head where an allocator divides budgets."""
    growth = Growth(generated_tokens)
    return lambda policy, context: sequence_bytes(policy, context, head_dim, growth)


@dataclass(frozen=True)
class Filled:
    """A policy of any model: the option of all heads, and what divides its budgets.

    Args:
        option: with its budget before it is divided.
        allocator: as given where nothing is left to divide.
        prompt_bytes: of one prompt as formats count them, lengths included.
    """

    option: Option
    allocator: Allocator
    prompt_bytes: int


@dataclass(frozen=True)
class Filling:
    """What sequences of one length, so many at once, leave to each of them.

    Args:
        question: what is asked.
        held: device memory of one sequence.
        context: prompt tokens of each.
        sequences: at once.
    """

    question: Question
    held: SequenceBytes
    context: int
    sequences: int

    def room(self, *, waits: bool) -> int:
        """Bytes of one sequence, generated tokens included.

        Args:
            waits: whether a prompt's whole cache is held until its end.
        """
        question = self.question
        prompt = question.prompt_budget(self.context, self.sequences, waits)
        return prompt + question.generated_bytes

    def filled(self, allocator: Allocator, method: Method, form: Format) -> Filled | None:
        """The largest budget that fits; None where not even a token a head does."""
        context = self.context
        shortest = min(context, self.question.tables.prompt_tokens)

        def alone(tokens: int) -> Policy:
            """For one head; all of them have as much before budgets are divided."""
            if tokens < context:
                option = Option(method, Budget(share=tokens / context), form, form)
                option = option.with_floor(shortest)
                return Policy.uniform(option, 1, 1, allocator=allocator)
            return Policy.uniform(Option(Full(), ALL, form, form), 1, 1, allocator=AsGiven())

        room = self.room(waits=alone(1).waits)

        def is_too_much(tokens: int) -> bool:
            policy = alone(tokens)
            held = self.question.tables.heads * self.held(policy, context)
            return held > room or not self._is_read(policy)

        kept = bisect_left(range(1, context + 1), True, key=is_too_much)
        if not kept:
            return None
        policy = alone(kept)
        return Filled(policy.heads[0][0], policy.allocator, self._prompt_bytes(policy))

    def _prompt_bytes(self, alone: Policy) -> int:
        heads = self.question.tables.heads
        each = alone.footprint(self.context, self.question.head_dim) - footprint_of_lengths(1, 1)
        return heads * each + footprint_of_lengths(1, heads)

    def _is_read(self, alone: Policy) -> bool:
        """Whether a decode step may read as much."""
        most = self.question.most_read
        return most is None or self._prompt_bytes(alone) <= most
