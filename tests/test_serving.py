"""Serving in simulation: nothing is lost, nothing held twice, queues are as theory has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.split import split_over
from kvtune.simulator.cost import policy_cost
from kvtune.simulator.latency.answers import least_certain
from kvtune.simulator.latency.steps import decode_step, prefill
from kvtune.simulator.latency.sums import sums_over_gpus
from kvtune.simulator.memory.plan import memory_plan
from kvtune.simulator.serving.engine import Engine, serve
from kvtune.simulator.serving.footprint import footprint
from kvtune.simulator.serving.memory import Memory
from kvtune.simulator.serving.record import Record
from kvtune.simulator.serving.report import Goals
from kvtune.simulator.serving.requests import Lengths, Requests, generate
from kvtune.simulator.serving.requests_file import read_requests
from kvtune.simulator.serving.scheduler import PASSED_OVER, Scheduler
from kvtune.simulator.serving.sequence import Footprint, Prefix, Sequence
from kvtune.simulator.serving.server import Server, server
from kvtune.simulator.serving.step import Limits, Step
from kvtune.simulator.serving.step_times import Chunk, Curve, StepTimes
from kvtune.simulator.serving.times import Load, prepare, step_times

LONGEST = 200
SMOL, H100 = find_model("smollm2-135m"), find_gpu("h100")


def times(base: float = 1.0, a_sequence: float = 0.0, a_token: float = 0.0) -> StepTimes:
    """Made-up times: linear in sequences and in tokens that they hold, and in tokens read."""
    decode = [
        [[base + n * (a_sequence + a_token * (p + g)) for g in (0, LONGEST)] for p in (0, LONGEST)]
        for n in range(9)
    ]
    empty = [base + n * a_sequence for n in range(9)]
    return StepTimes(
        prompts=Curve(0, LONGEST, [0, LONGEST]),
        generated=Curve(0, LONGEST, [0, LONGEST]),
        decode=decode,
        empty=empty,
        whole_pass=Curve(0, 400, [base, base + 400 * a_token]),
        compute=Curve(0, 400, [0, 400 * a_token]),
        compressing=Curve(0, LONGEST, [0, 0]),
        copy_s=(0.1, 0.01),
    )


def requests(*rows: tuple[float, int, int], prefixes: Any = ()) -> Requests:
    arrival, prompt, output = zip(*rows, strict=True)
    ints = np.array(prompt, np.int64), np.array(output, np.int64)
    return Requests(np.array(arrival, float), *ints, prefixes=prefixes)


def plain(kept: float = 1.0, shareable: bool = True) -> Footprint:
    """A byte a token, of which a share is kept once a prompt has been read."""
    reading = list(range(LONGEST + 1))
    return Footprint(reading, [math.ceil(kept * n) for n in reading], 1, shareable)


# --- conservation -------------------------------------------------------------------------------


class Audited(Scheduler):
    """Counts every block after every decision."""

    def plan(self, quiet_s: float) -> Step | None:
        step = super().plan(quiet_s)
        self.audit()
        return step

    def complete(self, step: Step) -> list[Sequence]:
        done = super().complete(step)
        self.audit()
        return done

    def audit(self) -> None:
        memory = self.memory
        held = [block for sequence in self.running for block in sequence.blocks]
        held += [b for segment in memory.prefixes.segments.values() for b in segment.blocks]
        everything = held + memory.pool._free
        assert sorted(everything) == list(range(memory.pool.total))
        moved = [block for sequence in self.waiting for block in sequence.swapped]
        assert sorted(moved + memory.host._free) == list(range(memory.host.total))
        idle = sum(len(s.blocks) for s in memory.prefixes.segments.values() if s.users == 0)
        assert memory.prefixes.idle_blocks == idle
        assert len(self.running) <= self.limits.sequences
        readers = [segment for sequence in self.running for segment in sequence.shared]
        assert sum(s.users for s in memory.prefixes.segments.values()) == len(readers)
        for sequence in self.running:
            if sequence.ends_at >= 0:  # is answered: holds what its tokens take, and no more
                held_now = sequence.output - (sequence.ends_at - self.decoding.step) - 1
                size = memory.footprint.kept_bytes(sequence.prompt, held_now)
                own = len(sequence.blocks) + sum(len(s.blocks) for s in sequence.shared)
                assert own >= memory.blocks_for(size)


ROWS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=ROWS,
    blocks=st.integers(1, 40),
    host=st.integers(0, 20),
    block_tokens=st.sampled_from([1, 4, 16]),
    limits=st.tuples(st.integers(1, 8), st.integers(8, 64), st.sampled_from(["arrival", "cached"])),
    kept=st.sampled_from([1.0, 0.3, 0.05]),
    shares=st.booleans(),
)
def test_every_request_is_answered_or_refused_and_no_block_is_lost(
    rows: list[tuple[int, int, int, int]],
    blocks: int,
    host: int,
    block_tokens: int,
    limits: tuple[int, int, Any],
    kept: float,
    shares: bool,
) -> None:
    rows.sort()
    prefixes = [
        Prefix(tuple("abc"[:group]), p * group // 4) if group and p * group >= 4 else None
        for _, p, _, group in rows
    ]
    asked = requests(*(row[:3] for row in rows), prefixes=prefixes)
    memory = Memory(plain(kept, shares), block_tokens, blocks, host)
    scheduler = Audited(memory, times(1.0, 0.01, 0.001), Limits(*limits))
    record = Engine(asked, scheduler, LONGEST).run()
    finished = np.isfinite(record.finished_s)
    assert finished.sum() + sum(record.refused.values()) == len(rows)
    assert memory.prefixes.available == blocks
    assert memory.host.free == host
    assert record.peak_blocks <= blocks
    arrival = asked.arrival_s[finished]
    started, first, last = (
        np.asarray(each)[finished] for each in (record.started_s, record.first_s, record.finished_s)
    )
    assert (arrival <= started).all()
    assert (started < first).all()
    assert (first <= last).all()


def test_a_request_that_can_never_fit_is_refused_with_its_reason() -> None:
    asked = requests((0, 50, 10), (0, 20, 5), (0, 150, 100))
    record = run(asked, blocks=3)
    assert dict(record.refused) == {
        "needs more cache than there is": 1,
        "longer than the model's context": 1,
    }
    assert np.isfinite(record.finished_s).tolist() == [False, True, False]


def run(
    asked: Requests,
    blocks: int = 200,
    host: int = 0,
    limits: Limits = Limits(8, 400),  # noqa: B008
    of: StepTimes | None = None,
    held: Footprint | None = None,
) -> Record:
    memory = Memory(held or plain(), 16, blocks, host)
    return Engine(asked, Scheduler(memory, of or times(), limits), LONGEST).run()


def test_requests_of_one_moment_are_read_in_one_step() -> None:
    together = run(requests(*[(0, 50, 10)] * 4, *[(7.5, 50, 10)] * 3))
    assert len(set(together.first_s[:4])) == len(set(together.first_s[4:])) == 1
    assert len(set(together.finished_s[:4])) == 1


# --- oracles ------------------------------------------------------------------------------------


def lindley(arrival: np.ndarray, service: np.ndarray) -> np.ndarray:
    """Waiting times of a queue with one server, first come first served."""
    waits = np.zeros(len(arrival))
    for i in range(1, len(arrival)):
        waits[i] = max(waits[i - 1] + service[i - 1] - (arrival[i] - arrival[i - 1]), 0)
    return waits


def one_by_one(count: int, outputs: np.ndarray, use: float) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals, and the engine's waiting times, one request at a time at a step a token."""
    arrival = np.cumsum(np.random.default_rng(3).exponential(1 / use, count))
    asked = Requests(arrival, np.ones(count, np.int64), outputs)
    longest = int(outputs.max()) + 1
    memory = Memory(Footprint([0, 1], [0, 1], 1), 16, longest // 16 + 2)
    record = Engine(asked, Scheduler(memory, times(0.01), Limits(1, 1)), longest).run()
    return arrival, np.asarray(record.started_s) - arrival


@pytest.mark.parametrize("use", [0.3, 0.7])
def test_one_at_a_time_with_fixed_service_is_an_m_d_1_queue(use: float) -> None:
    arrival, waited = one_by_one(5_000, np.full(5_000, 100), use)
    assert waited == pytest.approx(lindley(arrival, np.ones(5_000)), abs=1e-6)
    assert waited.mean() == pytest.approx(use / (2 * (1 - use)), rel=0.14)  # a small sample


def test_one_at_a_time_with_exponential_service_is_an_m_m_1_queue() -> None:
    steps = np.ceil(np.random.default_rng(4).exponential(100, 5_000)).astype(np.int64)
    arrival, waited = one_by_one(5_000, steps, 0.5)
    assert waited == pytest.approx(lindley(arrival, steps / 100), abs=1e-6)
    assert waited.mean() == pytest.approx(1.0, rel=0.2)


def step_by_step(asked: Requests, of: StepTimes, most: int) -> tuple[list[float], list[float]]:
    """Continuous batching with endless memory, one step and one token at a time."""
    count, now = len(asked), 0.0
    prompt, output = asked.prompt_tokens, asked.output_tokens
    first, last, tokens = [math.inf] * count, [math.inf] * count, [0] * count
    queue, running = list(range(count)), list[int]()
    while queue or running:
        if not running and asked.arrival_s[queue[0]] > now:
            now = float(asked.arrival_s[queue[0]])
        new: list[int] = []
        while queue and asked.arrival_s[queue[0]] <= now and len(running) + len(new) < most:
            new.append(queue.pop(0))
        held = [tokens[i] - 1 for i in running]
        means = (0.0, 0.0)
        if running:
            means = float(np.mean([prompt[i] for i in running])), float(np.mean(held))
        if new:
            now += of.mixed(len(running), *means, [Chunk(0, int(prompt[i])) for i in new])
        else:
            now += of.decoding(len(running), *means)
        for i in running + new:
            tokens[i] += 1
            first[i] = min(first[i], now)
            if tokens[i] == output[i]:
                last[i] = now
        running = [i for i in running + new if tokens[i] < output[i]]
    return first, last


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, most=st.integers(1, 8))
def test_rows_of_steps_end_when_single_steps_would(
    rows: list[tuple[int, int, int, int]], most: int
) -> None:
    asked = requests(*((at + 0.123 * i, p, n) for i, (at, p, n, _) in enumerate(sorted(rows))))
    of = times(1.0, 0.01, 0.001)
    record = run(asked, 2000, limits=Limits(most, 10_000), of=of)
    first, last = step_by_step(asked, of, most)
    assert record.first_s == pytest.approx(first, rel=1e-9)
    assert record.finished_s == pytest.approx(last, rel=1e-9)


# --- what the scheduler does ----------------------------------------------------------------------


def test_the_last_come_gives_way_and_is_read_anew() -> None:
    record = run(requests((0, 16, 40), (0, 16, 40)), blocks=5)
    counts = record.counts
    assert counts.preemptions == 1
    assert counts.prompt_tokens > 32  # the second prompt again, with what it had generated
    assert record.finished_s[0] == 40
    assert record.finished_s[1] > 60


def test_on_the_host_nothing_is_read_anew_and_copies_take_their_time() -> None:
    asked = requests((0, 16, 40), (0, 16, 40))
    counts = (moved := run(asked, blocks=5, host=5)).counts
    assert counts.preemptions == counts.swaps > 0
    assert counts.prompt_tokens == 32
    assert counts.copied_blocks % 2 == 0  # as many come back as left
    free = StepTimes(**vars(times()) | {"copy_s": (0.0, 0.0)})
    faster = run(asked, blocks=5, host=5, of=free)
    assert moved.finished_s[1] - faster.finished_s[1] == pytest.approx(
        2 * 0.1 * counts.swaps + 0.01 * counts.copied_blocks
    )


def test_long_prompts_are_read_in_chunks_beside_decoding() -> None:
    record = run(requests((0, 10, 30), (0.5, 100, 1)), limits=Limits(4, 21))
    assert record.first_s[0] == 1
    assert record.finished_s[0] == 30  # it gets its token at every step
    assert record.first_s[1] == 6  # 100 tokens in chunks of 20


def test_shared_beginnings_are_read_once_unless_the_policy_evicts() -> None:
    same = [Prefix(("system",), 64)] * 3
    asked = requests((0, 80, 1), (5, 80, 1), (9, 80, 1), prefixes=same)
    assert run(asked).counts.shared_tokens == 2 * 64
    assert run(asked, held=plain(1.0, shareable=False)).counts.shared_tokens == 0
    chains = [Prefix(("a", "b"), 64), Prefix(("a", "c"), 64), Prefix(("x", "b"), 64)]
    asked = requests((0, 80, 1), (5, 80, 1), (9, 80, 1), prefixes=chains)
    assert run(asked).counts.shared_tokens == 32  # "b" after "x" is another text


def test_prompts_that_are_held_already_go_first_where_asked() -> None:
    """With room for one text's prefix, texts that come in turns are read again and again."""
    texts = [Prefix((name,), 64) for name in "ab" * 6]
    asked = requests(*((0, 80, 1) for _ in texts), prefixes=texts)
    by_turns, cached = (
        run(asked, blocks=7, limits=Limits(1, 400, order)) for order in ("arrival", "cached")
    )
    assert by_turns.counts.shared_tokens == 0
    assert cached.counts.shared_tokens == 10 * 64  # all but the first of each text
    order = np.argsort(cached.started_s, kind="stable").tolist()
    assert order == [*range(0, 12, 2), *range(1, 12, 2)]


def test_nobody_is_passed_over_for_ever() -> None:
    held = Prefix(("a",), 64)
    texts = [held, None, *[held] * (PASSED_OVER + 20)]
    asked = requests(*((0, 80, 1) for _ in texts), prefixes=texts)
    record = run(asked, limits=Limits(1, 400, "cached"))
    order = np.argsort(record.started_s, kind="stable").tolist()
    assert order.index(1) == 1 + PASSED_OVER


def test_a_compressed_prompt_gives_blocks_back_when_it_has_been_read() -> None:
    asked = requests(*((0, 160, 30) for _ in range(4)))
    full, small = run(asked, blocks=13), run(asked, blocks=13, held=plain(0.1, False))
    assert full.peak_running == 1
    assert small.peak_running > 1
    assert max(small.finished_s) < max(full.finished_s)


# --- times and bytes of real models ---------------------------------------------------------------


def test_times_are_the_latency_models_at_the_grids_points() -> None:
    load = Load(8, (512, 1024), 128, 2048, 1 << 16)
    of = step_times(SMOL, H100, "bf16", None, load)["value"]
    asked = decode_step(SMOL, H100, "bf16", 8, SMOL.kv_bytes(1024 + 128), "runtime")
    assert of.decoding(8, 1024, 128) == pytest.approx(asked.value)
    whole = prefill(SMOL, H100, "bf16", 1024, execution="runtime")
    assert of.mixed(0, 0, 0, [Chunk(0, 1024)]) == pytest.approx(whole.value, rel=0.02)
    halves = of.mixed(0, 0, 0, [Chunk(0, 512)]) + of.mixed(0, 0, 0, [Chunk(512, 512)])
    assert halves > whole.value


SPARSE = {
    "reader": Option(Quest(block=16), Budget(tokens=128)),
    "on the host": Option(Quest(block=16), Budget(tokens=128), tier="host"),
    "all on the host": Option(tier="host"),
    "read back": Option(keys=Fitted(), values=Fitted()),
}


@pytest.mark.parametrize("card", ["4090", "h200"])
@pytest.mark.parametrize("option", SPARSE.values(), ids=SPARSE)
def test_steps_under_a_policy_take_what_an_estimate_says(option: Option, card: str) -> None:
    """What readers leave unread is not paid for; what the host and reading back take is."""
    gpu, policy = find_gpu(card), Policy.uniform(option, SMOL.layers, SMOL.kv_heads)
    of = step_times(SMOL, gpu, "bf16", policy, Load(8, (512, 1024), 128, 2048, 1 << 16))
    budget = memory_plan(SMOL, gpu, 10**10, context_tokens=1024, generated_tokens=128)
    for sequences in (1, 8):
        asked = policy_cost(policy, budget.at(sequences)).latency
        for end in ("value", "low", "high"):
            found = of[end].decoding(sequences, 1024, 128)
            assert found == pytest.approx(getattr(asked, end), rel=0.01)
    assert least_certain(of["value"].tier, asked.tier) == of["value"].tier
    assert set(of["value"].tiers) == {"decode steps", "reading prompts", "compressing"}
    assert least_certain(*of["value"].tiers.values()) == of["value"].tier


@pytest.mark.parametrize("gpus", [1, 2, 4, 16])
def test_several_cards_share_steps_and_cache_as_estimates_have_them(gpus: int) -> None:
    llama, limits = find_model("llama-8b"), Limits(8, 2048)
    serving = server(llama, H100, H100.visible_bytes, "bf16", limits, gpus=gpus)
    alone = server(llama, H100, H100.visible_bytes, "bf16", limits)
    asked = generate(20, 1.0, Lengths(1024, 1024), Lengths(128, 128), longest=131072)
    ready, single = prepare(serving, asked, None), prepare(alone, asked, None)
    # 8 KV heads: beyond 8 cards, some hold the same.
    assert ready.footprint.token * min(gpus, 8) == single.footprint.token
    assert serving.cache.value >= alone.cache.value
    local = split_over(llama, gpus)
    held = local.kv_bytes(1024 + 128)
    step = decode_step(local, H100, "bf16", 8, held, "runtime").value
    for rows, found in (
        (8, ready.times["value"].decoding(8, 1024, 128) - step),
        (1024, ready.times["value"].mixed(0, 0, 0, [Chunk(0, 1024)])
         - prefill(local, H100, "bf16", 1024, execution="runtime").value),
    ):  # fmt: skip
        sums = sums_over_gpus(llama, H100, gpus, rows).at().value
        assert found == pytest.approx(sums, rel=0.02, abs=3e-5)
    report = serve(ready, asked, Goals())
    assert report.finished == 20


def test_a_policy_on_several_cards_is_refused() -> None:
    serving = server(SMOL, H100, H100.visible_bytes, "bf16", Limits(8, 2048), gpus=3)
    policy = Policy.uniform(Option(keys=Int4(), values=Int4()), SMOL.layers, SMOL.kv_heads)
    asked = generate(5, 1.0, Lengths(256, 256), Lengths(16, 16), longest=2048)
    with pytest.raises(KvtuneError, match="one GPU only"):
        prepare(serving, asked, policy)
    with pytest.raises(KvtuneError, match="cannot share evenly"):
        server(SMOL, H100, H100.visible_bytes, "bf16", Limits(8, 2048), gpus=2)


def test_bytes_are_the_policys_own_and_only_eviction_stops_sharing() -> None:
    lengths = np.array([100, 300])
    shape = SMOL.layers, SMOL.kv_heads
    evicting = Policy.uniform(Option(SnapKV(), Budget(share=0.25)), *shape)
    coded = Policy.uniform(Option(keys=Int4(), values=Int4()), *shape)
    for policy, shareable in ((evicting, False), (coded, True)):
        held = footprint(SMOL, policy, lengths, 10)
        in_pages = sequence_bytes(policy, 300, SMOL.head_dim, Growth(10))
        assert held.kept_bytes(300, 10) == in_pages > policy.footprint(300, SMOL.head_dim)
        assert held.reading[300] == SMOL.kv_bytes(300)
        assert held.shareable is shareable


def smol_server(memory_bytes: int = 2 * 10**9) -> Server:
    return server(SMOL, H100, memory_bytes, "bf16", Limits(32, 1024))


def smol_requests(seed: int = 0, burstiness: float = 1.0) -> Requests:
    alike = Lengths(512, 512, 0.3)
    return generate(
        300, 100.0, alike, Lengths(64, 64, 0.3), longest=4096, burstiness=burstiness, seed=seed
    )


def test_the_same_seed_gives_the_same_report_and_another_does_not() -> None:
    reports = [
        serve(prepare(smol_server(), smol_requests(s), None), smol_requests(s), Goals(0.1, 0.01))
        for s in (0, 0, 1)
    ]
    assert reports[0] == reports[1]
    assert reports[0].figures != reports[2].figures
    for figure in reports[0].figures.values():
        assert figure.low <= figure.value <= figure.high


def test_bursts_make_requests_wait_longer() -> None:
    waits = [
        serve(
            prepare(smol_server(), smol_requests(burstiness=b), None),
            smol_requests(burstiness=b),
            Goals(),
        )
        .figures["ttft_p99"]
        .value
        for b in (0.0, 1.0, 4.0)
    ]
    assert waits == sorted(waits)


# --- files --------------------------------------------------------------------------------------


def test_json_lines_and_csv_say_the_same(tmp_path: Path) -> None:
    lines = [
        {"arrival_s": 2.5, "prompt_tokens": 64, "output_tokens": 3},
        {"arrival_s": 1, "prompt_tokens": 64, "output_tokens": 2, "prefix_ids": [7, "b"],
         "prefix_tokens": 48},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "a.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,prefix_ids,prefix_tokens\n"
        "2.5,64,3,,\n1,64,2,7 b,48\n"
    )
    for name in ("a.jsonl", "a.csv"):
        found = read_requests(tmp_path / name)
        assert found.arrival_s.tolist() == [1.0, 2.5]
        assert found.output_tokens.tolist() == [2, 3]
        assert list(found.prefixes) == [Prefix(("7", "b"), 48), None]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 0}', "output_tokens"),
        ('{"arrival_s": -1, "prompt_tokens": 4, "output_tokens": 1}', "arrival_s"),
        ('{"arrival_s": 0, "prompt_tokens": 4.5, "output_tokens": 1}', "prompt_tokens"),
        ('{"arrival_s": NaN, "prompt_tokens": 4, "output_tokens": 1}', "arrival_s"),
        ('{"arrival_s": 0, "prompt_tokens": 4}', "output_tokens is missing"),
        ('{"arrival_s": 0, "prompt": 4, "output_tokens": 1}', "unknown field 'prompt'"),
        ('{"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 1, "prefix_ids": [1]}', "together"),
        ("[1, 2]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 1}\n' + text)
    with pytest.raises(KvtuneError, match=says) as raised:
        read_requests(path)
    assert str(raised.value.where).endswith(":2")


def test_lengths_are_read_as_they_are_written() -> None:
    assert Lengths.parse("2k", 0.5) == Lengths(2048, 2048, 0.5)
    assert Lengths.parse("1k-4k", 0.0) == Lengths(1024, 4096)
    for text, variation in (("4k-1k", 0.0), ("1k-4k", 0.5), ("x", 0.0)):
        with pytest.raises(KvtuneError):
            Lengths.parse(text, variation)
