"""Whoever is asked how many sequences of a plan fit at once says the same number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtune.common.errors import DoesNotFitError
from kvtune.common.estimate import Estimate
from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.export.compare import compared
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import PolicyDocument, read_policy
from kvtune.policies.policy_file.parts import Serving
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.cost import full_cost, policy_cost
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.simulator.model_facts import model_facts
from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Tables, on_both_sides
from kvtune.simulator.serving.footprint import footprint
from kvtune.tuner.asked import given, solver_of
from kvtune.tuner.cases import Card
from kvtune.tuner.estimating import Asked
from kvtune.tuner.exchange import Choice
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.plans import Plans
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.question import Question
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.search import run_search
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import QualitySource, stand_in

SHAPE, GPU = find_model("llama-3.2-1b"), find_gpu("4090")
LIMIT, CONTEXT, NEW = 5 * 10**9, 8192, 300
MOVED = 10**8
KVZIP = Option(KVzip(), Budget(share=0.3), Int4(), Int4())


@pytest.fixture(scope="module")
def source() -> QualitySource:
    """Every option of the stand-in's tables, on the device and on the host, and a rule."""
    known = stand_in(SHAPE)
    tables = on_both_sides(known.tables)
    none = np.zeros(len(tables.samples), np.float32)
    rule = Rule("kvzip", KVZIP, ModelWide(), none)
    return replace(known, tables=replace(tables, rules=(rule,)))


@pytest.fixture(scope="module")
def memory() -> MemoryPlan:
    return memory_plan(
        SHAPE, GPU, LIMIT, context_tokens=CONTEXT, generated_tokens=NEW, weights="bf16"
    )


def request(folder: Path, **more: object) -> SearchRequest:
    asked = {"weights": "bf16", "context_tokens": CONTEXT, "generated_tokens": NEW} | more
    return SearchRequest(SHAPE.name, SHAPE, GPU, LIMIT, folder, stand_in=True, **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def question(source: QualitySource) -> Question:
    return solver_of(request(Path("unused"), moved_bytes=MOVED), source).question


def uniform(options: list[Option]) -> Choice:
    return np.full(HEADS, options.index(Option(keys=Int4(), values=Int4())), np.int64)


def ragged(options: list[Option]) -> Choice:
    """Every head another option of the device's."""
    here = [number for number, option in enumerate(options) if not option.on_host]
    return np.random.default_rng(3).choice(here, HEADS)


def waiting(options: list[Option]) -> Choice:
    """The rule behind the options."""
    return np.full(HEADS, len(options), np.int64)


def on_host(options: list[Option]) -> Choice:
    """Of every layer other heads in the host's memory, with other formats."""
    return np.random.default_rng(4).choice(len(options), HEADS)


HEADS = SHAPE.layers * SHAPE.kv_heads
CHOICES = [uniform, ragged, on_host, waiting]


def asked_of_estimate(document: PolicyDocument | None) -> int | None:
    asked = Asked(
        SHAPE.name, SHAPE, NEW, [Card(GPU, LIMIT, None)], [CONTEXT], [1], ["bf16"], document, False
    )
    return list(asked.cases())[-1].sequences_that_fit


@pytest.mark.parametrize("choose", CHOICES)
def test_search_estimate_export_serving_and_explorer_count_alike(
    source: QualitySource,
    memory: MemoryPlan,
    question: Question,
    choose: Callable[[list[Option]], Choice],
) -> None:
    tables = source.tables
    choice = choose(list(tables.options))
    policy = policy_of(tables, choice, "plan")
    most = int(memory.most(policy).value)
    assert most > 1

    assert question.most_of(CONTEXT, choice) == most, "search"

    assert policy_cost(policy, memory).sequences_that_fit == most, "estimate"
    many = policy_cost(policy, memory.at(most))
    assert many.sequences_that_fit == most, "estimate, of another batch"
    assert many.memory.value <= LIMIT < policy_cost(policy, memory.at(most + 1)).memory.value

    serving = Serving(
        context_tokens=CONTEXT, generated_tokens=NEW, cache_bytes=memory.at(most).cache_bytes
    )
    document = PolicyDocument(policy, model_facts(SHAPE), serving=serving)
    assert asked_of_estimate(document) == most, "kvtune estimate"
    rows = {row.name: row for row in compared(document)}
    assert rows["kvtune"].sequences == most, "export --compare"

    lengths = np.array([CONTEXT, CONTEXT])
    held = footprint(SHAPE, policy, lengths, NEW).kept_bytes(CONTEXT, NEW)
    assert held == memory.sequence_bytes(policy), "serve-sim"

    study = study_of(tables, choice)
    columns = figures_of(study, Setting(GPU, LIMIT, "bf16"))
    assert columns.tokens_that_fit[0] == most * CONTEXT, "explorer"
    assert columns.most(0) == memory.most(policy), "explorer, of an interval"


def study_of(tables: Tables, choice: Choice) -> Study:
    """Of one plan; its losses are of no interest."""
    facts = Facts(
        study="", kvtune="", shape=SHAPE, gpu=GPU.slug, memory_bytes=LIMIT, weights="bf16",
        generated_tokens=NEW, largest_kl=0.02, trials=0, seed=0, source="stand-in", stand_in="",
        kinds=(), selection_samples=0, held_out_samples=0, measured_tokens=CONTEXT, **given(tables),
    )  # fmt: skip
    one, loss = np.array([1]), np.zeros((1, 3))
    heads = choice[None].astype(np.uint16)
    plans = Plans(one, CONTEXT * one, one, one, loss, loss, np.zeros((1, 0)), heads, ({},))
    return Study(Path(), facts, plans, None, "finished")


HOST = {"moved_bytes": MOVED, "largest_kl": 100.0}


@pytest.mark.parametrize("more", [{}, {"stack": "vllm"}, {"stack": "llama-cpp"}, HOST])
def test_a_found_plan_and_the_uncompressed_cache_are_counted_alike(
    memory: MemoryPlan, tmp_path: Path, more: dict[str, object]
) -> None:
    found = run_search(request(tmp_path, **more))
    assert found.policy.uses_host == (more == HOST)
    where = f" as {more['stack']} lays them out" if "stack" in more else ""
    assert any(f"memory holds no more of this plan{where}." in note for note in found.notes)
    document = read_policy(tmp_path / "policy.yaml")
    rows = {row.name: row for row in compared(document)}
    assert rows[str(more.get("stack", "kvtune"))].sequences == found.sequences
    assert found.memory.value <= LIMIT, "peak memory"
    assert found.at_once.low <= found.sequences <= found.at_once.high
    if "stack" not in more:
        assert int(memory.most(found.policy).value) == found.sequences
        assert asked_of_estimate(document) == found.sequences
    assert_between_both_ends(memory, found)
    whole = int(memory.most(None).value)
    assert whole > 1
    assert full_cost(memory).sequences_that_fit == whole, "estimate"
    assert asked_of_estimate(None) == whole, "kvtune estimate"
    assert found.full_cache_sequences == whole, "search"
    assert rows["uncompressed"].sequences == whole, "export --compare"


def assert_between_both_ends(memory: MemoryPlan, found: SearchResult) -> None:
    """By hand: of the plan, of one that waits for its prompt's end, and of the uncompressed cache.

    Answers here are as long as prompts.
    """
    policy = Policy.uniform(KVZIP, SHAPE.layers, SHAPE.kv_heads, allocator=ModelWide())
    long = replace(memory, generated_tokens=CONTEXT)
    each, counted = long.sequence_bytes(policy), int(long.most(policy).value)
    waits = replace(
        found, budget=long, policy=policy, sequences=counted, sequence_bytes=each,
        full_cache_sequences=int(long.most(None).value),
    )  # fmt: skip
    one_prompt = SHAPE.kv_bytes(CONTEXT) * 15 // 16
    both = SHAPE.kv_bytes(2 * CONTEXT)
    assert ends(waits.at_once) == by_hand(long, each, one_prompt)
    assert ends(waits.full_cache_at_once) == by_hand(long, both, 0)
    assert ends(found.at_once) == by_hand(
        memory, found.sequence_bytes, one_prompt * found.policy.waits
    )


def ends(found: Estimate) -> tuple[float, float]:
    assert found.unit == "prompts"
    return found.low, found.high


def by_hand(memory: MemoryPlan, each: int, beside: int) -> tuple[int, int]:
    """The most with every part at its high end, and at its low one."""

    def fits(count: int, end: str) -> bool:
        parts = memory.weights, memory.overhead, memory.at(count).prefill
        fixed = sum(float(getattr(part, end)) for part in parts)
        return fixed + count * each + beside <= LIMIT

    low, high = (max(n for n in range(999) if fits(n, end) or not n) for end in ("high", "low"))
    return low, high


def test_tokens_that_fit_are_no_fewer_for_being_many_sequences(memory: MemoryPlan) -> None:
    for batch in (1, 7, 19):
        at = memory.at(batch)
        assert at.cache_tokens == at.cache_bytes // SHAPE.kv_bytes(1)
    small = find_model("gemma-3-1b")
    windows = memory_plan(small, GPU, LIMIT, context_tokens=CONTEXT, batch=7, weights="bf16")
    assert windows.cache_tokens is not None
    each, left = divmod(windows.cache_tokens, 7)
    assert left == 0
    assert 7 * windows.shape.kv_bytes(each) <= windows.cache_bytes


@pytest.mark.full
def test_so_many_as_are_said_to_fit_can_be_asked_for_and_one_more_is_refused(
    tmp_path: Path,
) -> None:
    """With heads on the host, where --batch once refused what was said to fit."""
    found = run_search(request(tmp_path / "first", **HOST))
    again = run_search(request(tmp_path / "again", sequences=found.sequences, **HOST))
    assert again.sequences == found.sequences
    with pytest.raises(DoesNotFitError, match=f"no plan fits {found.sequences + 1} ") as caught:
        run_search(request(tmp_path / "more", sequences=found.sequences + 1, **HOST))
    assert f"--batch {found.sequences} is the most" in str(caught.value.hint)


def test_a_policy_that_waits_leaves_room_for_one_prompt(memory: MemoryPlan) -> None:
    """By hand: what the limit leaves, less one prompt but for a layer, over each sequence."""
    option = Option(SnapKV(), Budget(share=0.5), Int8(), Int8())
    policy = Policy.uniform(option, SHAPE.layers, SHAPE.kv_heads)
    waiting = SHAPE.kv_bytes(CONTEXT) * 15 // 16
    left = LIMIT - sum(part.value for part in (memory.weights, memory.overhead, memory.prefill))
    each = memory.sequence_bytes(policy)
    assert memory.count(each) == int(left // each)
    assert memory.count(each, waiting) == int((left - waiting) // each)
    assert option.budget != ALL


def test_what_steps_of_many_sequences_work_with_comes_off_their_own_room() -> None:
    """Short prompts of a small model: a step's activations take more than reading one prompt."""
    shape = find_model("smollm2-135m")
    memory = memory_plan(shape, GPU, context_tokens=16, weights="bf16")
    each, most = memory.sequence_bytes(None), int(memory.most(None).value)
    assert most < memory.cache_bytes // each
    assert most * each <= memory.at(most).cache_bytes
    assert (most + 1) * each > memory.at(most + 1).cache_bytes - 2
