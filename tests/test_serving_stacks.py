"""Serving in simulation by a stack's kernels, in its order of work, for clients that ask anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.named import read_named
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency import stacks
from kvtune.simulator.latency.answers import least_certain
from kvtune.simulator.latency.front_end import FrontEnd
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads, small_kernels
from kvtune.simulator.latency.stacks import on_card
from kvtune.simulator.memory.engine_memory import EngineFlags, engine_memory
from kvtune.simulator.serving.engine import Engine, serve
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.report import Goals, measures
from kvtune.simulator.serving.requests import Lengths, Requests, generate_at_once
from kvtune.simulator.serving.scheduler import Scheduler
from kvtune.simulator.serving.sequence import Footprint
from kvtune.simulator.serving.server import StackKernels, server
from kvtune.simulator.serving.stack_times import StackGrids, StackTimes
from kvtune.simulator.serving.step import Limits
from kvtune.simulator.serving.step_times import Chunk, Curve, StepTimes
from kvtune.simulator.serving.times import prepare
from kvtune.tests.made_up_tables import RATE

LLAMA, H200 = find_model("llama-8b"), find_gpu("h200")
VLLM = StackKernels("vllm")
OVER = Overheads(1e-6, 1e-4, 1e-6, kernels=1.1, reading=1.2, launches_s=1e-6)


@pytest.fixture
def model(systems: Path) -> ServingModel:
    tables = ServingTables(systems, "h200_sxm", "vllm")
    return ServingModel(tables, LLAMA, 1, "bfloat16", "bfloat16", "bfloat16", RATE, OVER)


@pytest.fixture
def steps(model: ServingModel) -> StackTimes:
    return StackTimes(model, StackGrids(model, 64, 8192, 8192), "measured elsewhere")


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("tokens", [30, 1000, 8000])
def test_the_engine_reads_what_the_model_says(
    model: ServingModel, steps: StackTimes, batch: int, tokens: int
) -> None:
    decode, prefill = float(model.decode(batch, tokens)), float(model.prefill(tokens))
    assert steps.decoding(batch, tokens / 2, tokens / 2) == pytest.approx(decode, rel=0.02)
    assert steps.mixed(0, 0, 0, [Chunk(0, tokens)]) == pytest.approx(prefill, rel=0.02)


def test_a_prompt_in_chunks_takes_no_less_than_whole_and_decoding_beside_it_more(
    steps: StackTimes,
) -> None:
    whole = steps.mixed(0, 0, 0, [Chunk(0, 4096)])
    halves = [steps.mixed(0, 0, 0, [Chunk(at, 2048)]) for at in (0, 2048)]
    assert halves[0] < halves[1]
    assert sum(halves) > whole
    assert steps.mixed(32, 900, 100, [Chunk(0, 4096)]) > whole
    assert steps.scaled(2.0).mixed(0, 0, 0, [Chunk(0, 4096)]) == pytest.approx(2 * whole)


def test_a_step_that_reads_waits_for_the_hosts_launches(model: ServingModel) -> None:
    slow = replace(model, overheads=replace(OVER, launches_s=0.01))
    assert float(slow.prefill(1)) == pytest.approx(LLAMA.layers * 0.01)
    assert float(slow.decode(1, 1)) == float(model.decode(1, 1))  # which a graph launches


def test_formats_with_a_scale_a_block_norms_of_heads_and_experts_are_kernels_more() -> None:
    plain = small_kernels(LLAMA, "bfloat16")
    assert small_kernels(LLAMA, "fp8") == plain
    assert small_kernels(LLAMA, "nvfp4") == small_kernels(LLAMA, "fp8_block") == plain + 4
    normed = replace(LLAMA, query_key_norm=True, experts=find_model("mixtral-8x7b").experts)
    assert small_kernels(normed, "bfloat16") == plain + 2 + 3


def test_another_card_decodes_by_its_bandwidth_and_reads_by_its_arithmetic(
    model: ServingModel,
) -> None:
    card = find_gpu("4090")
    other = on_card(model, H200, card)
    bandwidths = H200.bandwidth_bytes_per_s / card.bandwidth_bytes_per_s
    rates = H200.bf16_flop_per_s / card.bf16_flop_per_s
    decode, prefill = (float(a / b) for a, b in (
        (other.decode(8, 4000), model.decode(8, 4000)), (other.prefill(4000), model.prefill(4000))
    ))  # fmt: skip
    assert decode == pytest.approx(bandwidths, rel=0.1)
    assert prefill == pytest.approx(rates, rel=0.1)


# --- clients that ask anew ----------------------------------------------------------------------


def steady(base: float = 1.0, a_token: float = 0.001) -> StepTimes:
    """A step takes a second and what it reads."""
    return StepTimes(
        prompts=Curve(0, 99, [0, 99]), generated=Curve(0, 99, [0, 99]),
        decode=[[[base, base], [base, base]]] * 33, empty=[base] * 33,
        whole_pass=Curve(0, 999, [base, base + 999 * a_token]),
        compute=Curve(0, 999, [0, 999 * a_token]), compressing=Curve(0, 99, [0, 0]),
    )  # fmt: skip


class Times:
    """Made-up times that keep every step that reads."""

    tier = "assumed"
    compressing = Curve(0, 1, [0, 0])

    def __init__(self) -> None:
        self.inner, self.seen = steady(), list[tuple[int, list[Chunk]]]()

    def decoding(self, sequences: int, prompt: float, generated: float) -> float:
        return self.inner.decoding(sequences, prompt, generated)

    def mixed(self, sequences: int, prompt: float, generated: float, chunks: Any) -> float:
        self.seen.append((sequences, list(chunks)))
        return self.inner.mixed(sequences, prompt, generated, chunks)

    def copying(self, blocks: int) -> float:
        return 0.0


def run(asked: Requests, limits: Limits, of: Times | None = None) -> Record:
    lengths = list(range(200))
    memory = Memory(Footprint(lengths, lengths, 1), 16, 4000, 0)
    return Engine(asked, Scheduler(memory, of or Times(), limits), 200).run()  # type: ignore[arg-type]


def at_once(lengths: list[tuple[int, int]], clients: int) -> Requests:
    prompts, outputs = (np.array(column, np.int64) for column in zip(*lengths, strict=True))
    return Requests(np.zeros(len(lengths)), prompts, outputs, at_once=clients)


LENGTHS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=40)
READINGS = st.sampled_from(["chunks", "whole", "alone"])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, clients=st.integers(1, 12), reading=READINGS)
def test_every_client_asks_anew_when_it_was_answered(
    lengths: list[tuple[int, int]], clients: int, reading: Any
) -> None:
    record = run(at_once(lengths, clients), Limits(32, 100, reading=reading))
    arrived, finished = np.array(record.arrived_s), np.array(record.finished_s)
    assert np.all(np.isfinite(finished))
    assert np.all(arrived[:clients] == 0)
    # The k-th that asks anew does so when the k-th of all was answered.
    assert (
        arrived[clients:].tolist() == np.sort(finished)[: max(len(lengths) - clients, 0)].tolist()
    )


def test_what_can_never_be_served_keeps_no_client_waiting() -> None:
    record = run(at_once([(5, 3), (190, 90), (5, 3), (5, 3)], 1), Limits(32, 100))
    assert record.refused == {"longer than the model's context": 1}
    assert np.isfinite(record.finished_s).sum() == 3


def test_drawn_clients_are_as_many_as_asked() -> None:
    asked = generate_at_once(50, 7, Lengths(10, 20), Lengths(5, 9), longest=99)
    assert (len(asked), asked.at_once) == (50, 7)
    assert asked.prompt_tokens.min() >= 10
    assert asked.output_tokens.max() <= 9


# --- how prompts are read -----------------------------------------------------------------------


MANY = [(60, 20), (90, 7), (35, 13), (80, 9), (20, 30), (75, 5)] * 4


def test_prompts_are_cut_where_they_are_read_in_chunks() -> None:
    of = Times()
    run(at_once(MANY, 5), Limits(32, 100, reading="chunks"), of)
    assert any(chunk.start for _, chunks in of.seen for chunk in chunks)
    assert any(sequences for sequences, _ in of.seen)


def test_whole_prompts_are_read_beside_decoding() -> None:
    of = Times()
    run(at_once(MANY, 5), Limits(32, 100, reading="whole"), of)
    assert not any(chunk.start for _, chunks in of.seen for chunk in chunks)
    assert any(sequences for sequences, _ in of.seen)


def test_prompts_are_read_in_steps_of_their_own() -> None:
    of = Times()
    record = run(at_once(MANY, 5), Limits(32, 100, reading="alone"), of)
    assert {sequences for sequences, _ in of.seen} == {0}
    assert record.counts.decoded == sum(outputs - 1 for _, outputs in MANY)


def test_prompts_that_are_held_back_are_read_together() -> None:
    alone, joined = Times(), Times()
    asked = [(30, 10 + i) for i in range(24)]
    run(at_once(asked, 8), Limits(32, 1000), alone)
    run(at_once(asked, 8), Limits(32, 1000, hold_steps=20), joined)
    assert len(joined.seen) < len(alone.seen)
    assert sum(len(chunks) for _, chunks in joined.seen) == len(asked)


@pytest.mark.parametrize("reading", ["alone", "chunks"])
def test_new_requests_wait_until_the_engine_looks_for_them(reading: Any) -> None:
    asked = [(30, 10 + i) for i in range(24)]
    found = {}
    for poll in (1, 7):
        record = run(at_once(asked, 8), Limits(32, 1000, reading=reading, poll_steps=poll), Times())
        found[poll] = np.array(record.first_s) - np.array(record.arrived_s)
        assert np.all(np.isfinite(record.finished_s))
    assert found[7][:8] == pytest.approx(found[1][:8])  # nothing decodes when they come
    assert found[7][8:].mean() > found[1][8:].mean()


# --- the whole ----------------------------------------------------------------------------------


def test_a_first_token_waits_for_the_front_end() -> None:
    record = run(at_once([(50, 10)], 1), Limits(32, 100))
    front = FrontEnd(3.0, 0.1, 2.0, peer_s=5.0)
    bare, whole = measures(record, Goals()), measures(record, Goals(), front)
    later = 3.0 + 50 * 0.1 + 2.0 * bare["tpot_mean"][0] + 5.0 * bare["mean_running"][0]
    assert whole["ttft_mean"][0] == pytest.approx(bare["ttft_mean"][0] + later)
    assert whole["latency_mean"][0] == pytest.approx(bare["latency_mean"][0] + later)
    assert whole["tpot_mean"] == bare["tpot_mean"]


def test_serving_by_a_stack_is_answered_with_an_interval(
    systems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "require_systems_folder", lambda: systems)
    limits = Limits(16, 2048)
    serving = server(LLAMA, H200, H200.visible_bytes, "bf16", limits, kernels=VLLM)
    asked = generate_at_once(40, 8, Lengths(500, 600), Lengths(20, 30), longest=4096)
    ready = prepare(serving, asked, None)
    figures = serve(ready, asked, Goals()).figures
    found, first = figures["tpot_p50"], figures["ttft_p50"]
    assert found.tier == "measured elsewhere"
    assert found.low < found.value < found.high
    assert found.value > 2 * LLAMA.active_parameters / H200.bandwidth_bytes_per_s / 1.5
    assert first.high >= first.value * ready.front.within > first.value
    assert first.low <= first.value / ready.front.within


def planned(budget: str) -> Policy:
    return read_named(budget).bind(LLAMA.layers, LLAMA.kv_heads)


def test_a_policy_is_served_by_the_plugin_in_vllm_alone(
    systems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "require_systems_folder", lambda: systems)
    asked = generate_at_once(4, 2, Lengths(50, 60), Lengths(2, 3), longest=4096)
    for other in (StackKernels("sglang"), StackKernels("vllm", "fp8")):
        limits = Limits(16, 2048)
        serving = server(LLAMA, H200, H200.visible_bytes, "bf16", limits, kernels=other)
        with pytest.raises(KvtuneError, match="kvtune's plugin in vLLM"):
            prepare(serving, asked, planned("snapkv 25% int4"))
    serving = server(
        LLAMA, H200, H200.visible_bytes, "bf16", Limits(16, 2048), kernels=StackKernels("vllm")
    )
    with pytest.raises(KvtuneError, match="more than reading each layer's prompt once"):
        prepare(serving, asked, planned("kvzip 25%"))


def test_a_policy_in_vllm_reads_whole_prompts_less_cache_and_leaves_blocks_to_answers(
    systems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "require_systems_folder", lambda: systems)
    serving = server(
        LLAMA, H200, H200.visible_bytes, "bf16", Limits(16, 2048), kernels=StackKernels("vllm")
    )
    asked = generate_at_once(40, 8, Lengths(4000, 4000), Lengths(20, 30), longest=8192)
    full, plan = (prepare(serving, asked, each) for each in (None, planned("snapkv 12% int4")))
    assert full.limits is None
    assert plan.limits == replace(serving.limits, reading="whole", left_to_answers=0.1)
    assert set(plan.tiers) == {"decode steps", "compressing", "matrices and reading"}
    for each in (full, plan):
        assert each.times["value"].tier == least_certain(*each.tiers.values())
    one, other = full.times["value"], plan.times["value"]
    alone = [each.decoding(16, 4000, 1) - each.decoding(16, 1, 1) for each in (one, other)]
    assert alone[0] > 0
    steps = [each.decoding(16, 4000, 1) for each in (one, other)]
    assert steps[1] < steps[0]
    assert other.compressing.at(4000) > one.compressing.at(4000) == 0
    asked_for = replace(serving, limits=replace(serving.limits, left_to_answers=0.3))
    chosen = prepare(asked_for, asked, planned("snapkv 12% int4"))
    assert chosen.limits is not None
    assert chosen.limits.left_to_answers == 0.3


def test_a_new_request_leaves_a_share_of_the_blocks_unless_nobody_runs() -> None:
    lengths = list(range(200))
    asked = at_once([(64, 40)] * 12, 12)
    most = {}
    for share in (0.0, 0.5):
        memory = Memory(Footprint(lengths, lengths, 1), 16, 40, 0)
        limits = Limits(32, 400, left_to_answers=share)
        record = Engine(asked, Scheduler(memory, Times(), limits), 200).run()  # type: ignore[arg-type]
        assert np.all(np.isfinite(record.finished_s))
        most[share] = record.peak_running, record.counts.preemptions
    assert most[0.0][0] > most[0.5][0]
    assert most[0.5][0] <= 20 // 4  # prompts have four blocks, and a sixth would not leave half
    assert most[0.0][1] > most[0.5][1] == 0
    alone = Memory(Footprint(lengths, lengths, 1), 16, 7, 0)
    record = Engine(at_once([(90, 10)], 1), Scheduler(alone, Times(), limits), 200).run()  # type: ignore[arg-type]
    assert np.isfinite(record.finished_s[0])


def test_a_cache_of_eight_bits_holds_twice_as_much_and_is_read_by_its_own_kernels(
    systems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "require_systems_folder", lambda: systems)
    asked = generate_at_once(8, 4, Lengths(1000, 1000), Lengths(20, 30), longest=8192)
    wide, narrow = (
        prepare(
            server(
                LLAMA, H200, H200.visible_bytes, "bf16", Limits(16, 2048),
                kernels=StackKernels("vllm", form),
            ),
            asked, None,
        )
        for form in ("bfloat16", "fp8")
    )  # fmt: skip
    assert narrow.footprint.token == wide.footprint.token / 2
    assert narrow.footprint.kept[900] == wide.footprint.kept[900] / 2
    faster = narrow.times["value"].decoding(16, 4000, 1) / wide.times["value"].decoding(16, 4000, 1)
    assert faster < 0.97


def test_copies_to_the_host_are_not_taken_to_be_free(
    systems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "require_systems_folder", lambda: systems)
    limits = Limits(16, 2048)
    serving = server(
        LLAMA, H200, H200.visible_bytes, "bf16", limits, host_bytes=10**9, kernels=VLLM
    )
    asked = generate_at_once(4, 2, Lengths(50, 60), Lengths(2, 3), longest=4096)
    with pytest.raises(KvtuneError, match="would cost nothing"):
        prepare(serving, asked, None)


@pytest.mark.parametrize("share", [None, 0.5])
def test_under_vllm_the_cache_is_what_vllm_leaves(share: float | None) -> None:
    limits, whole = Limits(64, 2048), H200.visible_bytes
    memory = whole if share is None else int(share * whole)
    found = server(LLAMA, H200, memory, "bf16", limits, kernels=VLLM).cache
    flags = EngineFlags(share, max_num_seqs=64, max_num_batched_tokens=2048)
    expected = engine_memory(LLAMA, H200, "bf16", flags).cache
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert found != server(LLAMA, H200, memory, "bf16", limits).cache
    half = server(LLAMA, H200, memory, "bf16", limits, kernels=StackKernels("vllm", "fp8")).cache
    assert half.value == pytest.approx(expected.value, rel=1e-6), "tokens are fewer bytes, not it"


def test_where_vllms_memory_is_not_known_a_note_says_whose_is_counted() -> None:
    limits = Limits(16, 2048)
    assert server(LLAMA, H200, H200.visible_bytes, "bf16", limits, kernels=VLLM).notes == ()
    indexed = find_model("deepseek-v3.2")
    of = indexed, H200, H200.visible_bytes, "fp8", limits
    found, own = server(*of, gpus=8, kernels=VLLM), server(*of, gpus=8)
    assert found.cache == own.cache
    (told,) = found.notes
    assert "what kvtune would leave" in told
    assert "index keys" in told
    assert own.notes == ()
