"""How many prompts fit at once, as a figure with an interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB, MIB
from kvtune.common.words import figure
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.at_once import bytes_of_each, prompts_at_once
from kvtune.simulator.memory.budget import MemoryBudget, memory_budget


@pytest.fixture(scope="module")
def budget() -> MemoryBudget:
    shape, gpu = find_model("llama-8b"), find_gpu("4090")
    return memory_budget(shape, gpu, 16 * 10**9, context_tokens=8192, weights="auto")


@given(each=st.integers(1, 2**34))
def test_both_ends_are_the_most_that_fit_at_their_end_of_the_memory(
    budget: MemoryBudget, each: int
) -> None:
    found = prompts_at_once(int(budget.cache.value // each), each, budget)
    for number, end in ((found.low, budget.cache.low), (found.high, budget.cache.high)):
        assert number * each <= end < (number + 1) * each


def test_the_number_that_was_counted_elsewhere_is_never_outside(budget: MemoryBudget) -> None:
    for counted in (0, 1, 10**6):
        found = prompts_at_once(counted, 300 * MIB, budget)
        assert found.low <= counted <= found.high


def test_what_a_prompt_takes_is_read_off_the_peak(budget: MemoryBudget) -> None:
    fixed = sum(part.value for part in (budget.weights, budget.overhead, budget.prefill))
    peak = fixed + 8 * 0.5 * GIB
    assert bytes_of_each(8, Estimate(peak, peak, peak, "B", "assumed"), budget) == 0.5 * GIB


def test_prompts_are_shown_as_whole_numbers() -> None:
    assert figure(Estimate(17, 14, 1800, "prompts", "assumed")) == "17 [14, 1 800] assumed"
