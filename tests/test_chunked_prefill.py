"""Prefills in chunks and behind prefixes, beside whole ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvtune import estimate
from kvtune.__main__ import main
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.chunks import chunked_prefill
from kvtune.simulator.latency.reading import Reading
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


def test_a_prompt_that_is_all_prefix_is_refused() -> None:
    assert Reading(100).new_tokens(101) == 1
    with pytest.raises(KvtuneError, match="prefix of 100 tokens in a prompt of 100"):
        Reading(100).new_tokens(100)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    asked = ["estimate", "-m", "llama-8b", "-g", "h200", "--context", "32k", "--json", "--quiet"]
    assert main([*asked, "--policy", "h2o 25% int4", *words]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


def test_the_command_times_prefixes_and_chunks_with_and_without_compression(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, behind, cut = (
        answer(capsys, *words)
        for words in ((), ("--prefix", "24k"), ("--prefix", "24k", "--chunk", "16"))
    )
    for full, policy in (whole, behind, cut):
        assert full["first_token"] == full["prefill"]
        assert policy["prefill"] == full["prefill"]
        assert policy["first_token"]["value"] > full["first_token"]["value"]
    assert behind[0]["prefill"]["value"] < cut[0]["prefill"]["value"]
    assert behind[0]["prefill"]["value"] < whole[0]["prefill"]["value"]
    alone = chunked_prefill(SHAPE, find_gpu("h200"), "bf16", 8192, 24576, execution="runtime")
    assert behind[0]["prefill"]["value"] == pytest.approx(alone.value)


def test_the_library_times_what_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    (case,) = estimate("llama-8b", gpu="h200", context="32k", prefix="24k", chunk=256)
    told = answer(capsys, "--prefix", "24k", "--chunk", "256")[0]
    assert case.cost is not None
    assert case.cost.first_token.value == told["first_token"]["value"]


@pytest.mark.parametrize(
    "words", [("--prefix", "32k"), ("--chunk", "0"), ("--prefix", "-1"), ("--prefix", "some")]
)
def test_the_command_refuses_lengths_that_are_none(words: tuple[str, ...]) -> None:
    asked = ["estimate", "-m", "llama-8b", "-g", "h200", "--context", "32k", "--quiet"]
    assert main([*asked, *words]) == 2


def test_a_long_prompt_in_single_tokens_is_answered_at_once() -> None:
    found = chunked_prefill(SHAPE, find_gpu("h200"), "bf16", 131072, chunk_tokens=1)
    assert found.value > 131072 * 1e-3  # each reads the weights
