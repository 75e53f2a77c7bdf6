"""The memory model: what weights take, what is left for the cache, errors that say what fits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.common.units import GB, GIB, parse_bytes
from kvtune.profiles.gpus import find_gpu, list_gpus
from kvtune.profiles.models import find_model, list_models
from kvtune.simulator.memory.peak import (
    overhead_bytes,
    peak_memory,
    prefill_peak_bytes,
    required_bytes,
)
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.simulator.memory.weights import WEIGHT_FORMATS, bits_per_weight, weight_bytes

LLAMA, SMOL, CARD = find_model("llama-8b"), find_model("smollm2-135m"), find_gpu("4090")
SHAPES = st.sampled_from(list_models())
CARDS = st.sampled_from(list_gpus())
FORMATS = st.sampled_from([name for name in WEIGHT_FORMATS if name != "stored"])


def budget(limit: str | None, **changes: Any) -> MemoryPlan:
    settings = {"context_tokens": 8192, **changes}
    return memory_plan(LLAMA, CARD, parse_bytes(limit) if limit else None, **settings)


# --- weights -----------------------------------------------------------------------------------


def test_bf16_weights_are_two_bytes_each_and_exact() -> None:
    weights = weight_bytes(LLAMA, "bf16")
    assert weights.value == 2 * 8_030_261_248
    assert weights.tier == "exact"
    assert weights.low == weights.high == weights.value


def test_four_bit_weights_pay_for_scales_and_zero_points() -> None:
    assert bits_per_weight(LLAMA, "int4") == 4.25
    assert 8 < bits_per_weight(LLAMA, "int8") < 8.01


def test_embedding_and_output_matrix_stay_at_sixteen_bits() -> None:
    tables = 2 * 128_256 * 4096
    matrices = 32 * (2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 14336)
    norms = 65 * 4096
    expected = 2 * (tables + norms) + matrices * 4.25 / 8
    assert weight_bytes(LLAMA, "int4").value == expected
    assert 5.7e9 < expected < 5.9e9  # published AWQ and GPTQ files: 5.73 GB


@settings(deadline=None, derandomize=True)
@given(SHAPES)
def test_wider_formats_take_more(shape: Any) -> None:
    sizes = [weight_bytes(shape, name).value for name in ("int4", "int8", "fp8", "bf16")]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[3]


# --- the budget --------------------------------------------------------------------------------


def test_sixteen_gb_cannot_hold_bf16_weights_so_eight_bits_are_chosen_with_a_reason() -> None:
    result = budget("16GB")
    assert result.weight_format == "fp8"
    assert "bf16 ones take 14.96 GiB of 14.90 GiB" in result.reason
    assert result.limit_bytes == 16 * GB
    assert result.cache_tokens is not None
    assert result.cache_tokens > 30_000


def test_gb_and_gib_are_not_the_same() -> None:
    difference = budget("16GiB").cache_bytes - budget("16GB").cache_bytes
    assert difference == pytest.approx(16 * GIB - 16 * GB, abs=1)


def test_a_card_without_fp8_gets_int8() -> None:
    ampere = memory_plan(LLAMA, find_gpu("3090"), 16 * GB, context_tokens=8192)
    assert ampere.weight_format == "int8"
    assert "fp8" not in ampere.reason


def test_the_users_format_is_kept() -> None:
    result = budget("16GB", weights="int4")
    assert (result.weight_format, result.reason) == ("int4", "int4 weights, as asked for")
    assert result.cache_bytes > budget("16GB").cache_bytes


def test_without_a_limit_all_that_the_card_shows_is_used() -> None:
    result = budget(None)
    assert result.limit_bytes == CARD.visible_bytes
    assert result.weight_format == "bf16"


def test_a_gigabyte_is_enough_for_the_small_model() -> None:
    result = memory_plan(SMOL, CARD, GIB, context_tokens=1024)
    assert result.weight_format == "bf16"
    assert result.cache_tokens is not None
    assert result.cache_tokens > 4 * 1024
    assert result.share_that_fits == 1


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, st.integers(1, 200_000), st.integers(1, 64), st.floats(0.05, 1))
def test_the_parts_add_up_to_the_limit(
    shape: Any, card: Any, context: int, batch: int, share: float
) -> None:
    limit = int(share * card.visible_bytes)
    try:
        result = memory_plan(shape, card, limit, context_tokens=context, batch=batch)
    except KvtuneError:
        assume(False)
    parts = (result.weights, result.overhead, result.prefill, result.cache)
    assert sum(part.value for part in parts) == pytest.approx(limit)
    for part in parts:
        assert 0 <= part.low <= part.value <= part.high
        assert part.unit == "B"
    assert result.cache_tokens is not None
    tokens = result.cache_tokens // batch
    assert batch * shape.kv_bytes(tokens) <= result.cache_bytes + 1
    assert batch * shape.kv_bytes(tokens + 1) + batch > result.cache_bytes
    assert tokens >= min(context, 1024)
    assert 0 < result.share_that_fits <= 1


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, FORMATS, st.integers(1, 100_000), st.integers(1, 32))
def test_the_smallest_limit_is_enough_and_a_byte_less_is_not(
    shape: Any, card: Any, name: Any, context: int, batch: int
) -> None:
    need = required_bytes(shape, card, name, context, batch)
    assume(need <= card.visible_bytes)
    settings = {"context_tokens": context, "batch": batch, "weights": name}
    assert memory_plan(shape, card, need, **settings).weight_format == name
    with pytest.raises(KvtuneError, match="does not fit"):
        memory_plan(shape, card, need - 1, **settings)


def test_the_peak_with_the_budgets_cache_is_the_limit() -> None:
    result = budget("16GB", batch=4)
    peak = peak_memory(LLAMA, CARD, "fp8", result.cache_bytes // 4, 8192, batch=4)
    assert peak.value == pytest.approx(16 * GB, abs=4)
    assert peak.low < peak.value < peak.high
    assert peak.tier == "assumed"


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, FORMATS, st.integers(1, 100_000), st.integers(1, 32), st.integers(1, 10**9))
def test_the_peak_grows_with_all_that_is_asked_for(
    shape: Any, card: Any, name: Any, context: int, batch: int, cache: int
) -> None:
    base = peak_memory(shape, card, name, cache, context, batch).value
    assert base < peak_memory(shape, card, name, cache + 1, context, batch).value
    assert base <= peak_memory(shape, card, name, cache, context + 1, batch).value
    assert base < peak_memory(shape, card, name, cache, context, batch + 1).value


MAPPED = 1.15  # what the allocator holds of that, over what is in use


def test_the_prefill_peak_holds_one_layers_cache_and_not_all() -> None:
    longer = prefill_peak_bytes(LLAMA, 65536).value - prefill_peak_bytes(LLAMA, 32768).value
    a_layer, residual = 32768 * 2 * 8 * 128 * 2, 32768 * 4096 * 2
    queries, window = residual, 4 * 32 * 32768 * 32
    assert longer == pytest.approx(
        MAPPED * (1.5 * a_layer + 2 * residual + 3 * queries + 3 * window)
    )
    assert longer < LLAMA.kv_bytes(32768)


def test_a_latent_layer_is_held_as_latents() -> None:
    shape = find_model("deepseek-v3")
    longer = prefill_peak_bytes(shape, 65536).value - prefill_peak_bytes(shape, 32768).value
    a_layer, residual, queries = (32768 * 2 * n for n in (512 + 64, 7168, 128 * shape.head_dim))
    window = 4 * 32 * 32768 * 128
    assert longer == pytest.approx(
        MAPPED * (1.5 * a_layer + 2 * residual + 3 * queries + 3 * window)
    )


def test_a_large_batch_of_decode_steps_can_be_the_peak() -> None:
    assert prefill_peak_bytes(SMOL, 16, batch=512).value > prefill_peak_bytes(SMOL, 16).value


def test_overhead_holds_the_context_and_follows_the_model() -> None:
    small, large = (overhead_bytes(shape, CARD, "bf16") for shape in (SMOL, LLAMA))
    assert CARD.context_bytes < small.value < large.value < 1.5 * GIB


def test_the_dictionary_is_complete_and_plain() -> None:
    result = budget("16GB").as_dict()
    assert {"model": LLAMA.name, "gpu": CARD.name} == {key: result[key] for key in ("model", "gpu")}
    assert result["limit_bytes"] == result["weights"]["value"] + sum(  # type: ignore[index]
        result[part]["value"]  # type: ignore[index]
        for part in ("overhead", "prefill", "cache")
    )
    assert result["cache"] == budget("16GB").cache.as_dict()


# --- what does not fit -------------------------------------------------------------------------


def hint_of(**arguments: Any) -> str:
    with pytest.raises(KvtuneError) as caught:
        memory_plan(**{"shape": LLAMA, "gpu": CARD, "context_tokens": 8192, **arguments})
    return f"{caught.value} | {caught.value.hint}"


@pytest.mark.parametrize("size", [100 * 10**6, 2 * GB, 6 * GB])
@pytest.mark.parametrize("group", [1, 2])
def test_the_limit_in_the_hint_works_when_typed_back(size: int, group: int) -> None:
    said = re.search(
        r"smallest limit that works is ([\d.]+GB) \(([\d.]+GiB)\), with (\w+) weights",
        hint_of(limit_bytes=size),
    )
    assert said is not None
    limit = parse_bytes(said[group])
    assert memory_plan(LLAMA, CARD, limit, context_tokens=8192).weight_format == said[3]
    with pytest.raises(KvtuneError):
        memory_plan(LLAMA, CARD, int(limit - 0.02 * GIB), context_tokens=8192)


def test_a_chosen_format_that_does_not_fit_names_one_that_does() -> None:
    said = hint_of(limit_bytes=16 * GB, weights="bf16")
    assert "bf16 weights 14.96 GiB" in said
    assert "fp8 weights fit in this limit; all of that with bf16 ones needs 17." in said
    assert "16.00 GB (14.90 GiB)" in said


def test_the_context_in_the_hint_fits_when_typed_back_and_a_longer_one_does_not() -> None:
    asked: dict[str, Any] = {"limit_bytes": 17_500_000_000, "weights": "bf16"}
    said = re.search(r"--context (\d+) at most", hint_of(**asked, context_tokens=65536))
    assert said is not None
    most = int(said[1])
    assert memory_plan(LLAMA, CARD, **asked, context_tokens=most).weight_format == "bf16"
    assert "does not fit" in hint_of(**asked, context_tokens=most + 1024)


def test_a_shorter_context_is_not_offered_where_none_fits() -> None:
    said = hint_of(shape=find_model("llama-3.3-70b"))
    assert "no limit on this GPU is enough: all of that with int4 weights needs 42.97GB" in said
    assert "context" not in said.split(" | ")[1]


def test_a_limit_above_what_the_card_shows_is_refused_with_the_most_that_works() -> None:
    said = hint_of(limit_bytes=24 * GIB)
    assert "more than the 25.25 GB (23.52 GiB) that RTX 4090 shows" in said
    assert "its box says 24 GiB" in said
    most = re.search(r"at most ([\d.]+GiB) \(([\d.]+GB)\)", said)
    assert most is not None
    for text in most.groups():
        assert budget(text).limit_bytes <= CARD.visible_bytes


def test_a_model_that_no_limit_can_hold_says_so() -> None:
    said = hint_of(shape=find_model("deepseek-v3"))
    assert "no limit on this GPU is enough" in said
    assert "smallest limit" not in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"limit_bytes": 0}, "above zero"),
        ({"context_tokens": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"weights": "fp88"}, "'fp88' is no weight format. Did you mean 'fp8'"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], says: str) -> None:
    assert says in hint_of(**changes)


# --- the largest batch ---------------------------------------------------------------------------


@given(
    shape=SHAPES,
    card=CARDS,
    share=st.sampled_from((0.1, 0.5, 1.0)),
    tokens=st.sampled_from((1024, 8192, 32768)),
    chunk=st.sampled_from((2048, 32768)),
)
def test_the_largest_batch_fits_and_one_more_does_not(
    shape: Any, card: Any, share: float, tokens: int, chunk: int
) -> None:
    each = share * shape.kv_bytes(tokens)
    memory = MemoryPlan(shape, card, card.visible_bytes, "int4", "", tokens, chunk_tokens=chunk)
    found = memory.most_of(each)
    for batch, end in ((found.value, "value"), (found.low, "high"), (found.high, "low")):
        here, more = (
            getattr(peak_memory(shape, card, "int4", each, tokens, int(n), chunk), end)
            for n in (batch, batch + 1)
        )
        assert here <= card.visible_bytes or batch == 0
        assert more > card.visible_bytes - 2
    assert found.low <= found.value <= found.high
    assert found.unit == "sequences"


def test_a_prompt_read_in_one_piece_leaves_less_room() -> None:
    h100, each = find_gpu("h100"), 0.12 * LLAMA.kv_bytes(32768)
    memory = MemoryPlan(LLAMA, h100, h100.visible_bytes, "bf16", "", 32768)
    chunks, whole = memory.most_of(each), replace(memory, chunk_tokens=32768).most_of(each)
    assert whole.value < chunks.value
    assert whole.low < chunks.low
