"""Bytes of plans' sequences as the serving stack lays them out that a search was for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.policy import Policy
from kvtune.profiles.shape import ModelShape
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.plans import Floats, Integers


def each_on_stack(
    facts: Facts, given: Sequence[Policy], heads: NDArray[np.integer], contexts: Integers
) -> Floats | None:
    """Bytes of one sequence of each plan with its answer, ``[n]``.

    None of a search that was for no stack, or for one that is not told how many it may run.

    Args:
        facts: of the study.
        given: the options, each as a policy of one head.
        heads: numbers of options, layer by layer, ``[n, I]``.
        contexts: prompt tokens of a sequence, ``[n]``.
    """
    if not facts.stack or not len(heads):
        return None
    size = _size_on(facts.stack, facts.shape, facts.generated_tokens)
    if size is None:
        return None
    options = [next(policy.options()) for policy in given]
    asked = np.concatenate([heads.astype(np.int64), contexts[:, None]], 1)
    rows, which = np.unique(asked, axis=0, return_inverse=True)
    shape = facts.shape.layers, facts.shape.kv_heads

    def bytes_of(row: NDArray[np.int64]) -> int:
        layers = row[:-1].reshape(shape).tolist()
        policy = Policy("", tuple(tuple(options[o] for o in layer) for layer in layers))
        return size(policy, int(row[-1]))

    return np.array([bytes_of(row) for row in rows], np.float64)[which.ravel()]


@lru_cache(maxsize=8)
def _size_on(
    stack: str, shape: ModelShape, generated_tokens: int
) -> Callable[[Policy, int], int] | None:
    """The exporter's count, each answer kept: a setting is changed many times, plans are not."""
    from kvtune.tuner.on_stack import sequence_bytes_on  # exporters take a while to import

    size = sequence_bytes_on(stack, shape, generated_tokens)
    return None if size is None else lru_cache(maxsize=4096)(size)
