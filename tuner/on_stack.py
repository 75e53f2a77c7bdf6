"""What a serving stack holds of one sequence of a plan, where it tells how many it may run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from kvtune.policies.export.contract import find_exporter
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import PolicyDocument, Serving
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.model_facts import model_facts
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.exchange import Choice
from kvtune.tuner.solver import policy_of

BytesThere = Callable[[Choice, int], int]
"""Bytes of one sequence of a choice, with its answer, at a context."""


def bytes_there(
    stack: str | None, tables: Tables, shape: ModelShape, generated_tokens: int
) -> BytesThere | None:
    """What the stack's exporter says; None where nothing tells the stack how many it may run."""
    if stack is None:
        return None
    size = sequence_bytes_on(stack, shape, generated_tokens)
    if size is None:
        return None

    @lru_cache(maxsize=4096)
    def of(options: bytes, context: int) -> int:
        return size(policy_of(tables, np.frombuffer(options, np.int64), ""), context)

    return lambda choice, context: of(choice.astype(np.int64).tobytes(), context)


def sequence_bytes_on(
    stack: str, shape: ModelShape, generated_tokens: int
) -> Callable[[Policy, int], int] | None:
    """Bytes of one sequence of a policy at a context; None where the stack is not told how many."""
    exporter, facts = find_exporter(stack)(), model_facts(shape)

    def size(policy: Policy, context: int) -> int:
        serving = Serving(context_tokens=context, generated_tokens=generated_tokens)
        document = PolicyDocument(policy, facts, serving=serving)
        return exporter.export(document, allow_stand_in=True).sequence_bytes

    whole = Policy.uniform(Option(), shape.layers, shape.kv_heads)
    return size if size(whole, 1) else None
