"""Prompts that are read in chunks, or behind a prefix whose keys and values are there already."""

from __future__ import annotations

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.steps import Execution, prefills
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
    end = prefix_tokens + prompt_tokens
    begins = np.arange(prefix_tokens, end, chunk_tokens or prompt_tokens)
    ends = np.append(begins[1:], end)
    after, before, alone = (
        prefills(shape, gpu, weight_format, tokens, batch, execution)
        for tokens in (ends, np.maximum(begins, 1), ends - begins)
    )
    longer = np.maximum(after.value_s - before.value_s, alone.value_s)
    taken = np.where(begins == 0, after.value_s, longer)
    # A chunk's ends are as far from it as those of the prefill up to its end.
    value, low, high = (
        float(np.sum(np.where(begins == 0, side, taken * side / after.value_s)))
        for side in (after.value_s, after.low_s, after.high_s)
    )
    return Estimate(value, low, high, "s", after.tier)
