"""How many sequences a serving stack holds of a plan, where it counts otherwise than our pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import PolicyDocument, Serving
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.model_facts import model_facts
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.exchange import Choice
from kvtune.tuner.solver import policy_of

Counted = Callable[[Choice, int, int], int]
"""Sequences of a choice, at a context, in so many bytes."""


def counted_on(
    stack: str | None, tables: Tables, shape: ModelShape, generated_tokens: int
) -> Counted | None:
    """What the stack's exporter says; None where nothing tells the stack how many it may run."""
    if stack is None:
        return None
    exporter, facts = find_exporter(stack)(), model_facts(shape)

    def sequences(policy: Policy, context: int, room_bytes: int) -> int | None:
        serving = Serving(
            context_tokens=context, generated_tokens=generated_tokens, cache_bytes=room_bytes
        )
        document = PolicyDocument(policy, facts, serving=serving)
        try:
            return exporter.export(document, allow_stand_in=True).sequences
        except KvtuneError:  # not one of them fits
            return 0

    @lru_cache(maxsize=4096)
    def of(options: bytes, context: int, room_bytes: int) -> int:
        policy = policy_of(tables, np.frombuffer(options, np.int64), "")
        return sequences(policy, context, room_bytes) or 0

    def counted(choice: Choice, context: int, room_bytes: int) -> int:
        return of(choice.astype(np.int64).tobytes(), context, max(room_bytes, 0))

    whole = Policy.uniform(Option(), shape.layers, shape.kv_heads)
    return None if sequences(whole, tables.prompt_tokens, 2**60) is None else counted
