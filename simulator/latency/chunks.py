"""Prompts that are read in chunks, or behind a prefix whose keys and values are there already."""

from __future__ import annotations

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.steps import Execution, prefill
from kvtune.simulator.memory.weights import WeightFormat


def chunked_prefill(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    prompt_tokens: int,
    prefix_tokens: int = 0,
    chunk_tokens: int | None = None,
    batch: int = 1,
    execution: Execution = "graph",
) -> Estimate:
    """Seconds to read prompts, chunk after chunk, each attending to all that was before it.

    A chunk takes what a prefill takes longer for it than for what stands before, since both do the
    rest alike; and at least what it takes alone, since small matrices are not multiplied faster.

    Args:
        shape: the model.
        gpu: the card.
        weight_format: how the matrices are stored.
        prompt_tokens: P of each prompt, without the prefix.
        prefix_tokens: tokens before it whose keys and values are held.
        chunk_tokens: read at once; the whole prompt unless given.
        batch: prompts that are read together.
        execution: as a prefill's.

    Raises:
        KvtuneError: a negative prefix, or a chunk without tokens.
    """
    if prefix_tokens < 0 or (chunk_tokens is not None and chunk_tokens < 1):
        raise KvtuneError(
            f"a prefix of {prefix_tokens} tokens, read in chunks of {chunk_tokens}",
            hint="a prefix has 0 tokens or more, a chunk 1 or more.",
        )

    def whole(tokens: int) -> Estimate:
        return prefill(shape, gpu, weight_format, tokens, batch, execution)

    step, end = chunk_tokens or prompt_tokens, prefix_tokens + prompt_tokens
    parts = [
        _longer(whole(min(at + step, end)), whole(at) if at else None, whole(min(step, end - at)))
        for at in range(prefix_tokens, end, step)
    ]
    low, value, high = (sum(getattr(part, name) for part in parts) for name in _ENDS)
    return Estimate(value, low, high, "s", parts[0].tier)


_ENDS = "low", "value", "high"


def _longer(after: Estimate, before: Estimate | None, alone: Estimate) -> Estimate:
    """What a chunk adds; its ends are as far from it as those of the prefill up to its end."""
    if before is None:
        return after
    value = max(after.value - before.value, alone.value)
    return Estimate(
        value, value * after.low / after.value, value * after.high / after.value, "s", after.tier
    )
