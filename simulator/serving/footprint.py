"""Bytes of cache that a sequence takes: while its prompt is read, and from then on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.option import ALL
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.serving.sequence import Footprint

GRID, PAGED_GRID = 128, 33  # lengths at which bytes are counted; between them they are a line


def evicts(policy: Policy) -> bool:
    """Whether any head keeps less than the whole prompt."""
    return any(option.budget != ALL for option in policy.options())


def footprint(
    shape: ModelShape, policy: Policy | None, prompt_tokens: NDArray[np.int64], output_tokens: int
) -> Footprint:
    """The footprint under a policy, or of the uncompressed cache.

    A generated token takes what the layers that still grow after the shortest prompt take, which
    is the most that any does.

    Args:
        shape: the model.
        policy: for its layers and KV heads; None for the uncompressed cache.
        prompt_tokens: of all prompts.
        output_tokens: of the longest answer.

    Raises:
        KvtuneError: a policy for another shape, or for layers whose cache is no full cache of
            heads.
    """
    if policy is None:
        return whole_footprint(shape, prompt_tokens)
    shortest, longest = int(prompt_tokens.min()), int(prompt_tokens.max())
    reading = _by_length(shape.kv_bytes, 0, longest)
    token = shape.kv_bytes(shortest + 1) - shape.kv_bytes(shortest)
    check_shape(shape, policy, longest + output_tokens)
    growth, answer = Growth(output_tokens), output_tokens * token

    def kept(tokens: int) -> int:
        """Of a prompt, so that with the longest answer it is what the runtime's pages take."""
        if tokens == 0:
            return 0
        return sequence_bytes(policy, tokens, shape.head_dim, growth) - answer

    return Footprint(reading, _by_length(kept, 0, longest, PAGED_GRID), token, not evicts(policy))


def whole_footprint(
    shape: ModelShape, prompt_tokens: NDArray[np.int64], element_bytes: int = 2
) -> Footprint:
    """The footprint of the uncompressed cache.

    Args:
        shape: the model, or one card's share of it.
        prompt_tokens: of all prompts.
        element_bytes: of a cached number.
    """
    shortest, longest = int(prompt_tokens.min()), int(prompt_tokens.max())

    def size(tokens: int) -> int:
        return shape.kv_bytes(tokens, element_bytes)

    held = _by_length(size, 0, longest)
    return Footprint(held, held, max(size(shortest + 1) - size(shortest), 1))


def check_shape(shape: ModelShape, policy: Policy, tokens: int) -> None:
    """Refuse a policy that cannot be costed on a shape for sequences of so many tokens."""
    policy.check_fits(shape.layers, shape.kv_heads)
    if not shape.keeps_all(tokens):
        raise KvtuneError(
            f"{shape.name} has layers that do not cache every token by the same heads; "
            "policies for those cannot be costed yet"
        )


def _by_length(size: Callable[[int], int], first: int, last: int, points: int = GRID) -> list[int]:
    """``size`` of every length, counted on a grid and rounded up between."""
    lengths = np.arange(first, last + 1)
    grid = np.unique(np.linspace(first, last, points).astype(np.int64))
    counted = [size(int(length)) for length in grid]
    found: list[int] = np.ceil(np.interp(lengths, grid, counted)).astype(np.int64).tolist()
    return found
