"""The latency model: bounds, directions, intervals and baselines. Nothing here is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.benchmarks.rooflines import roofline_decode_steps, scaled_decode_steps
from kvtune.common.errors import KvtuneError
from kvtune.policies.format import formats
from kvtune.policies.formats.blocked import block_forms
from kvtune.policies.page_formats import VALUE_CODES
from kvtune.profiles.gpus import find_gpu, list_gpus
from kvtune.profiles.models import find_model, list_models
from kvtune.simulator.latency import steps as latency
from kvtune.simulator.latency.answers import Times
from kvtune.simulator.latency.priors import CACHE_FACTOR, UNREPORTED_CACHE_FACTOR, cache_factor
from kvtune.simulator.latency.steps import (
    decode_step,
    decode_steps,
    prefill,
    prefills,
)
from kvtune.simulator.latency.terms import cache_read, matrices, prompt_attention
from kvtune.simulator.memory.weights import WEIGHT_FORMATS, WeightFormat

LLAMA, H100 = find_model("llama-8b"), find_gpu("h100")
SHAPES = st.sampled_from(list_models())
CARDS = st.sampled_from(list_gpus())
PLAIN = tuple(name for name in WEIGHT_FORMATS if name != "stored")
FORMATS = st.sampled_from(PLAIN)
BATCHES = st.integers(1, 256)
BYTES = st.floats(0, 1e10)


@pytest.fixture(autouse=True, scope="module")
def datasheets_only() -> Iterator[None]:
    """What is tested here is the datasheet tier, on the cards that were measured too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "tables_for", lambda gpu: None)
        yield


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, FORMATS, BATCHES, BYTES)
def test_no_step_is_faster_than_the_roofline(
    shape: Any, card: Any, name: Any, batch: int, cache: float
) -> None:
    bound = float(roofline_decode_steps(shape, card, name, batch, cache))
    assert decode_step(shape, card, name, batch, cache).value > bound


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, FORMATS, BATCHES, BYTES, st.sampled_from(["graph", "eager"]))
def test_every_answer_has_an_interval_around_it_and_a_tier(
    shape: Any, card: Any, name: Any, batch: int, cache: float, execution: Any
) -> None:
    step = decode_step(shape, card, name, batch, cache, execution)
    assert 0 < step.low < step.value < step.high
    assert (step.tier, step.unit) == ("datasheet", "s")
    assert step.low < 0.81 * step.value  # a sheet alone is not worth more than 20 %
    assert step.high > 1.19 * step.value


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, FORMATS, BATCHES, BYTES, st.integers(1, 100), st.floats(1e3, 1e9))
def test_more_sequences_and_more_bytes_take_longer(
    shape: Any, card: Any, name: Any, batch: int, cache: float, more: int, bytes_more: float
) -> None:
    base = decode_step(shape, card, name, batch, cache)
    wider = decode_step(shape, card, name, batch + more, cache)
    longer = decode_step(shape, card, name, batch, cache + bytes_more)
    assert base.value < wider.value
    assert base.value < longer.value
    assert base.high < wider.high
    assert base.high < longer.high


@settings(deadline=None, derandomize=True)
@given(SHAPES, CARDS, st.integers(1, 100_000), st.integers(1, 32))
def test_longer_prompts_and_more_of_them_take_longer(
    shape: Any, card: Any, prompt: int, batch: int
) -> None:
    base = prefill(shape, card, "bf16", prompt, batch)
    assert 0 < base.low < base.value < base.high
    assert base.value < prefill(shape, card, "bf16", 2 * prompt, batch).value
    assert base.value < prefill(shape, card, "bf16", prompt, batch + 1).value


def test_arrays_broadcast_and_agree_with_single_answers() -> None:
    batch, cache = np.array([[1], [8]]), np.array([0.0, 1e8, 1e9])
    times = decode_steps(LLAMA, H100, "fp8", batch, {"bf16": cache, "int4": 2 * cache})
    assert isinstance(times, Times)
    assert times.value_s.shape == times.low_s.shape == times.high_s.shape == (2, 3)
    single = decode_step(LLAMA, H100, "fp8", 8, {"bf16": 1e8, "int4": 2e8})
    one = times.at(1, 1)
    assert (one.value, one.low, one.high) == pytest.approx((single.value, single.low, single.high))
    prompts = prefills(LLAMA, H100, "bf16", np.array([128, 4096]), 2)
    assert prompts.at(1).value == prefill(LLAMA, H100, "bf16", 4096, 2).value


def test_a_plain_number_of_bytes_means_sixteen_bits() -> None:
    plain = decode_step(LLAMA, H100, "bf16", 4, 1e9)
    assert plain == decode_step(LLAMA, H100, "bf16", 4, {"bf16": 1e9})


def test_narrow_cache_formats_gain_less_than_their_bytes() -> None:
    tokens, batch = 32768, 16
    full = LLAMA.kv_bytes(tokens)
    empty = decode_step(LLAMA, H100, "bf16", batch, 0).value
    names = {16: "bf16", 8: "int8", 4: "int4", 2: "int2"}
    reads = {
        bits: decode_step(LLAMA, H100, "bf16", batch, {name: full * bits / 16}).value - empty
        for bits, name in names.items()
    }
    assert reads[16] > reads[8] > reads[4]  # still a gain
    assert reads[8] > reads[16] / 2
    assert reads[4] > reads[16] / 4
    assert reads[2] > reads[16] / 8


def test_the_factor_of_a_narrow_cache_falls_with_its_bits() -> None:
    for names in (("int2", "int3", "int4", "int8", "bf16"), ("int4", "fp8", "bf16")):
        for end in ("low", "value", "high"):
            factors = [cache_factor(name, end) for name in names]
            assert factors == sorted(factors)
    for prior in (*CACHE_FACTOR.values(), UNREPORTED_CACHE_FACTOR):
        assert 0 < prior.low <= prior.value <= prior.high <= 1


def test_every_format_has_a_price_of_its_own_and_an_unreported_one_a_wider() -> None:
    # What has pages is priced.
    in_blocks = {form.name for form in block_forms().values()}
    assert {*VALUE_CODES, "allocated", *in_blocks} == {*CACHE_FACTOR} <= {*formats()}
    widest = max(prior.high / prior.low for prior in CACHE_FACTOR.values())
    assert cache_factor("fp6", "high") / cache_factor("fp6", "low") > 2 * widest


def test_narrow_weights_gain_less_than_their_bytes() -> None:
    steps = {name: decode_step(LLAMA, H100, name, 1, 0).value for name in PLAIN}
    assert steps["int4"] < steps["int8"] < steps["bf16"]
    assert steps["int4"] > steps["bf16"] / 16 * 4.25


def test_an_eager_step_does_not_see_the_cache_and_a_graph_does() -> None:
    short, long = LLAMA.kv_bytes(1024), LLAMA.kv_bytes(16384)
    eager = [decode_step(LLAMA, H100, "bf16", 1, size, "eager").value for size in (short, long)]
    graph = [decode_step(LLAMA, H100, "bf16", 1, size, "graph").value for size in (short, long)]
    assert eager[0] == eager[1] > 2 * graph[1]
    assert graph[0] < graph[1]


def test_an_eager_step_with_much_to_read_waits_for_the_gpu() -> None:
    size = 40e9
    eager = decode_step(LLAMA, H100, "bf16", 1, size, "eager").value
    assert eager > size / H100.bandwidth_bytes_per_s


def test_floors_are_paid_a_layer() -> None:
    shape = find_model("smollm2-135m")
    step = decode_step(shape, H100, "bf16", 1, shape.kv_bytes(64)).value
    roofline = float(roofline_decode_steps(shape, H100, "bf16", 1, shape.kv_bytes(64)))
    assert step > shape.layers * 25e-6 > 2 * roofline


def test_latent_attention_is_bound_by_products_and_grouped_heads_by_bytes() -> None:
    latent = find_model("deepseek-v3")
    extra = {
        shape.name: decode_step(shape, H100, "bf16", 1, 2e9).value
        - decode_step(shape, H100, "bf16", 1, 1e9).value
        for shape in (latent, LLAMA)
    }
    by_bytes = 1e9 / (0.88 * H100.bandwidth_bytes_per_s)
    assert extra["llama-3.1-8b"] == pytest.approx(by_bytes, rel=1e-6)
    assert extra["deepseek-v3"] > 1.1 * by_bytes


def test_a_mixture_reads_more_weights_for_more_tokens() -> None:
    shape = find_model("gpt-oss-20b")
    one, many = (decode_step(shape, H100, "bf16", batch, 0).value for batch in (1, 32))
    dense_one, dense_many = (decode_step(LLAMA, H100, "bf16", b, 0).value for b in (1, 32))
    assert many / one > 2 > dense_many / dense_one


def test_sliding_windows_make_long_prompts_cheaper() -> None:
    gemma = find_model("gemma-3-27b")
    everywhere = replace(gemma, windows=(None,) * gemma.layers)
    tokens = 131072
    assert (
        prefill(gemma, H100, "bf16", tokens).value
        < 0.6 * prefill(everywhere, H100, "bf16", tokens).value
    )
    short = [prefill(shape, H100, "bf16", 512).value for shape in (gemma, everywhere)]
    assert short[0] == pytest.approx(short[1])


def test_causal_attention_counts_each_pair_once() -> None:
    tiny = replace(LLAMA, windows=(3,) * 32)
    for prompt, pairs in ((2, 3), (3, 6), (5, 12)):  # 1+2, 1+2+3, 1+2+3+3+3
        term = prompt_attention(tiny, H100, np.array(float(prompt)), np.array(1.0))
        operations = 32 * pairs * 32 * (128 + 128) * 2
        assert float(term.value) == pytest.approx(operations / (0.52 * H100.bf16_flop_per_s))


def test_a_geforce_prefill_runs_at_the_fp32_accumulation_rate() -> None:
    card, tokens = find_gpu("4090"), 8192
    products = 2 * (LLAMA.active_parameters - 128_256 * 4096) * tokens
    assert prefill(LLAMA, card, "bf16", tokens).value > products / 165.2e12
    assert prefill(LLAMA, card, "int4", tokens).value == pytest.approx(
        prefill(LLAMA, card, "bf16", tokens).value
    )


def test_baselines_are_what_their_names_say() -> None:
    cache, batch = 1e9, 2
    read = 2 * (LLAMA.parameters - 128_256 * 4096) + batch * cache
    roof = roofline_decode_steps(LLAMA, H100, "bf16", batch, cache)
    assert float(roof) == pytest.approx(read / 3.35e12)
    scaled = scaled_decode_steps(LLAMA, H100, "bf16", np.array([batch, batch]), cache)
    assert scaled == pytest.approx(read / (0.8 * 3.35e12) + 3e-6 * (5 * 32 + 1))
    large = roofline_decode_steps(LLAMA, H100, "bf16", 4096, 0)
    assert float(large) == pytest.approx(2 * LLAMA.active_parameters * 4096 / 989e12)


def test_published_single_stream_rates_lie_in_the_interval() -> None:
    """gpt-fast's own tables: Llama-2-7B on an A100-80 SXM, batch 1, short context, compiled."""
    llama2 = replace(LLAMA, kv_heads=32, intermediate_size=11008, vocab_size=32000)
    assert llama2.parameters == 6_738_415_616
    card = find_gpu("a100")
    rates: dict[WeightFormat, float] = {"bf16": 104.9, "int8": 155.6, "int4": 196.8}
    for name, tokens_per_s in rates.items():
        step = decode_step(llama2, card, name, 1, llama2.kv_bytes(200))
        assert step.low < 1 / tokens_per_s < step.high


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": np.array([1, np.nan])}, "batch must be at least 1"),
        ({"cache_bytes_per_sequence": -1.0}, "cache bytes must be at least 0"),
        ({"cache_bytes_per_sequence": {}}, "at least one format"),
        ({"cache_bytes_per_sequence": {"int5": 1.0}}, "unknown format 'int5'"),
        ({"weight_format": "fp7"}, "'fp7' is no weight format"),
        ({"execution": "lazy"}, "runtime, graph, eager"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], says: str) -> None:
    good = {"batch": 1, "cache_bytes_per_sequence": 1.0, "weight_format": "bf16"}
    with pytest.raises(KvtuneError, match=says):
        decode_steps(shape=LLAMA, gpu=H100, **{**good, **arguments})


def test_reading_a_narrow_cache_has_both_ends_of_both_efficiencies() -> None:
    size, bandwidth = 1e9, H100.bandwidth_bytes_per_s
    term = cache_read(H100, np.array(1.0), {"int4": np.array(size)})
    assert float(term.value) == pytest.approx(size / (0.88 * 0.55 * bandwidth))
    assert float(term.low) == pytest.approx(size / (0.94 * 0.80 * bandwidth))
    assert float(term.high) == pytest.approx(size / (0.77 * 0.30 * bandwidth))


@pytest.mark.parametrize(("name", "achieved"), [("a100", 0.76), ("4090", 0.89)])
def test_weights_are_read_at_the_share_of_the_cards_kind_of_memory(
    name: str, achieved: float
) -> None:
    card, one = find_gpu(name), np.array(1.0)
    read = 2 * (LLAMA.parameters - 128_256 * 4096)
    term = matrices(LLAMA, card, "bf16", one, logits=one)
    assert float(term.value) == pytest.approx(read / (achieved * card.bandwidth_bytes_per_s))
