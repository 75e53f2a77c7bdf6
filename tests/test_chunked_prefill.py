"""Prefills in chunks and behind prefixes, beside whole ones."""

from __future__ import annotations

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.chunks import chunked_prefill
from kvtune.simulator.latency.steps import prefill

SHAPE = find_model("llama-3.1-8b")


@pytest.mark.parametrize("card", ["h200", "4090"])
def test_one_chunk_without_a_prefix_is_a_prefill(card: str) -> None:
    gpu = find_gpu(card)
    assert chunked_prefill(SHAPE, gpu, "bf16", 5000) == prefill(SHAPE, gpu, "bf16", 5000)


@pytest.mark.parametrize("card", ["h200", "4090"])
def test_chunks_take_no_less_than_a_whole_prompt_and_small_ones_more(card: str) -> None:
    gpu = find_gpu(card)
    taken = [
        chunked_prefill(SHAPE, gpu, "bf16", 16384, chunk_tokens=n).value for n in (16384, 2048, 64)
    ]
    assert taken[0] <= taken[1] * 1.001
    assert taken[1] < taken[2]


def test_a_prefix_costs_the_attention_to_it() -> None:
    """Beside what the prompt takes alone: 4 D operations of each pair of a query and a token."""
    gpu = find_gpu("4090")

    def of(prefix: int) -> Estimate:
        return chunked_prefill(SHAPE, gpu, "bf16", 2048, prefix_tokens=prefix)

    alone, behind, far = of(0), of(16384), of(32768)
    pairs = 4 * SHAPE.head_dim * SHAPE.query_heads * SHAPE.layers * 2048 * 16384
    assert alone.value < behind.value < far.value
    added = far.value - behind.value
    assert pairs / gpu.bf16_flop_per_s < added < 4 * pairs / gpu.bf16_flop_per_s
    assert behind.low < behind.value < behind.high


def test_lengths_that_are_none_are_refused() -> None:
    with pytest.raises(KvtuneError, match="prefix of -1"):
        chunked_prefill(SHAPE, find_gpu("h200"), "bf16", 10, prefix_tokens=-1)
    with pytest.raises(KvtuneError, match="chunks of 0"):
        chunked_prefill(SHAPE, find_gpu("h200"), "bf16", 10, chunk_tokens=0)
