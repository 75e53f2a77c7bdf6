"""How many prompts fit at once, as a figure with an interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.common.estimate import Estimate
from kvtune.common.units import MIB
from kvtune.common.words import figure
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.at_once import prompts_at_once
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan


@pytest.fixture(scope="module")
def budget() -> MemoryPlan:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    return memory_plan(shape, gpu, 16 * 10**9, context_tokens=8192, weights="auto")


def taken(budget: MemoryPlan, prompts: int, each: int, end: str) -> float:
    """The peak of so many prompts with every part at one end."""
    at_once = budget.at(max(prompts, 1))
    parts = at_once.weights, at_once.overhead, at_once.prefill
    return float(prompts * each + sum(getattr(part, end) for part in parts))


@given(each=st.integers(2**20, 2**34))
def test_both_ends_are_the_most_that_fit_at_their_end_of_the_memory(
    budget: MemoryPlan, each: int
) -> None:
    found = prompts_at_once(budget.count(each), budget.most_of(each))
    for number, end in ((found.low, "high"), (found.high, "low")):
        if number:
            assert taken(budget, int(number), each, end) <= budget.limit_bytes + 1
        assert taken(budget, int(number) + 1, each, end) > budget.limit_bytes - 2


def test_the_number_that_was_counted_elsewhere_is_never_outside(budget: MemoryPlan) -> None:
    for counted in (0, 1, 10**6):
        found = prompts_at_once(counted, budget.most_of(300 * MIB))
        assert found.low <= counted <= found.high


def test_prompts_are_shown_as_whole_numbers() -> None:
    assert figure(Estimate(17, 14, 1800, "prompts", "assumed")) == "17 [14, 1 800] assumed"
