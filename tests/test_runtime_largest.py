"""The largest batch that fits, on a device whose memory is made up: tensors count as they live."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.paging import Growth, head_pages, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.runtime import largest
from kvtune.runtime.admission import read_for_all
from kvtune.runtime.cache import pool
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.device import unless_full
from kvtune.runtime.fuse import _side_by_side
from kvtune.runtime.graph import DecodeLoop
from kvtune.runtime.largest import (
    Bounds,
    Largest,
    find_largest,
    search_largest,
)
from kvtune.runtime.timing import uncompressed
from kvtune.tests.tiers import each, first
from kvtune.traces.models import wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PLAN = Policy.uniform(Option(H2O(), Budget(share=0.5), Int4(), Int4()), 3, 2, name="plan")
SMALL = 120_000  # bytes: a few of the tiny model's caches


class Memory:
    """A device of so many bytes: pools count from when they are made until nothing holds them."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.peak = total, 0, 0
        self.released = 0

    def take(self, tensor: Tensor) -> None:
        if self.used + tensor.nbytes > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.used += tensor.nbytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(tensor.untyped_storage(), self.give, tensor.nbytes)

    def give(self, size: int) -> None:
        self.used -= size

    # What a bench is asked for.

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        return 8.0

    def forget_peak(self) -> None:
        self.peak = self.used

    def release(self) -> None:
        gc.collect()
        self.released += 1
        self.forget_peak()

    def look(self) -> None:
        """NVML is missing here."""

    def peak_bytes(self) -> int:
        return self.peak

    def device_bytes(self) -> int | None:
        return None

    def reserved_bytes(self) -> int:
        return self.peak_bytes()

    def outside_bytes(self) -> int:
        return 0

    def capped(self, limit_bytes: int) -> AbstractContextManager[int]:
        return nullcontext(0)

    def available_bytes(self) -> int:
        return self.total - self.used


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return wrap(make_network(LlamaConfig(**tiny_fields), tried=True), None, name="tiny").model


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Memory]:
    """A device whose memory all pools are taken from."""

    def make(total: int) -> Memory:
        memory, extend = Memory(total), pool.Pool.extend

        def extended(self: pool.Pool, cells: int) -> None:
            extend(self, cells)
            memory.take(self.memory)

        monkeypatch.setattr(pool.Pool, "extend", extended)
        monkeypatch.setattr(largest, "STEPS", 1)
        monkeypatch.setattr(largest, "STRETCHES", 1)
        return memory

    return make


def page_bytes(policy: Policy) -> int:
    """Of one sequence's pages, with a try's new tokens, as the device that is made up counts."""
    found = 0
    for option, kept in zip(policy.options(), policy.budgets(70).flat, strict=True):
        pages = head_pages(option, int(kept), 70, 8, Growth(64))
        found += sum(count * layout.page_bytes for layout, count in pages.items())
    return found


def prompt(tokens: int = 70) -> Tensor:
    return torch.randint(2, 250, (1, tokens), generator=torch.Generator().manual_seed(0))


# --- the search ----------------------------------------------------------------------------------


def searched(fits: int, guess: int, **bounds: Any) -> tuple[Largest[int], list[int]]:
    asked: list[int] = []

    def attempt(batch: int) -> int:
        asked.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return -batch

    return search_largest(attempt, guess, Bounds(**bounds)), asked


@each(
    "fits, guess",
    [(x, y) for x in (0, 1, 2, 7, 15, 60, 124, 500) for y in (0, 1, 14, 15, 16, 124, 130, 400)],
)
def test_it_is_closed_in_on_from_any_guess(fits: int, guess: int) -> None:
    found, asked = searched(fits, guess, tries=40)
    assert (found.batch, found.too_large, found.is_exact) == (fits, fits + 1, True)
    assert found.found == (-fits if fits else None)
    assert found.tries == len(asked) == len(set(asked))
    assert asked[0] == max(1, guess)


@pytest.mark.parametrize(("fits", "guess"), [(124, 118), (124, 131), (15, 14), (15, 17), (7, 8)])
def test_a_good_guess_takes_few_tries(fits: int, guess: int) -> None:
    found, _ = searched(fits, guess)
    assert found.is_exact
    assert found.tries <= 6


def test_tries_are_bounded_and_what_is_left_open_is_said() -> None:
    found, asked = searched(500, 10, tries=3)
    assert asked == [10, 11, 13]
    assert (found.batch, found.too_large, found.is_exact) == (13, None, False)


def test_time_is_bounded_by_the_longest_try() -> None:
    now = iter(range(0, 1000, 10))  # the clock is asked twice a try, which then takes ten seconds
    found, _ = searched(500, 10, seconds=45.0, clock=lambda: float(next(now)))
    assert found.tries == 2
    assert not found.is_exact


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_the_device_is_full_in_other_words_too(words: str) -> None:
    def fail(error: Exception) -> None:
        raise error

    assert unless_full(lambda: fail(RuntimeError(words))) is None
    assert unless_full(lambda: 7) == 7
    for other in (RuntimeError("an illegal memory access"), KvtuneError("the pool is full")):
        with pytest.raises(type(other)):
            unless_full(lambda error=other: fail(error))  # type: ignore[misc]


# --- caches on a made-up device ------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PLAN, uncompressed(PLAN)], ids=lambda p: p.name)
def test_pages_are_predicted_as_the_pool_takes_them(network: Any, policy: Policy) -> None:
    cache = load_cache(policy, network, new_tokens=64)
    read_for_all(network, cache, prompt(), 5)
    assert cache.page_bytes() <= 5 * page_bytes(policy) <= cache.pool.memory.nbytes
    cache.reserve(64)
    assert cache.page_bytes() == 5 * page_bytes(policy)


def test_a_filled_batch_says_what_prompts_read_together_do(network: Any) -> None:
    """Its pages, and the tokens that come from them, are those of an ordinary prefill."""
    told, kept = [], []
    for fills in (True, False):
        cache = load_cache(PLAN, network, new_tokens=64)
        with torch.no_grad():
            if fills:
                logits = read_for_all(network, cache, prompt(), 3).expand(3, -1)
            else:
                answer = network(
                    prompt().expand(3, -1), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                logits = answer.logits[:, -1]
            first, places = logits.argmax(-1), torch.full((3,), 70)
            told.append(DecodeLoop(network, cache, first, places, 12).run())
        kept.append((cache.kept(), cache.prompt_bytes()))
    assert torch.equal(*told)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("guess", first([2, None, 40]))
def test_the_largest_batch_is_what_the_devices_memory_holds(
    network: Any, device: Callable[[int], Memory], guess: int | None
) -> None:
    memory = device(SMALL)
    plan = find_largest(PLAN, network, prompt(), memory, guess, Bounds(tries=30))
    full = find_largest(uncompressed(PLAN), network, prompt(), memory, guess, Bounds(tries=30))
    for found, policy in ((plan, PLAN), (full, uncompressed(PLAN))):
        assert found.is_exact
        assert found.found is not None
        assert found.found.batch == found.batch
        assert found.found.tokens_per_second.value == found.batch / 8
        assert found.found.peak_bytes <= SMALL
        assert found.batch <= SMALL // page_bytes(policy)
    assert plan.batch > full.batch > 1
    assert (memory.used, network.config._attn_implementation) == (0, "kvtune")


@pytest.mark.full
def test_nothing_of_a_try_is_there_in_the_next(
    network: Any, device: Callable[[int], Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches refer to themselves: without the release, each try would find the last one's."""
    memory = device(SMALL)
    before: list[int] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        before.append(memory.used)
        return load_cache(*args, **kwargs)

    monkeypatch.setattr(largest, "load_cache", load)
    gc.disable()
    try:
        found = find_largest(PLAN, network, prompt(), memory, 2, Bounds(tries=30))
    finally:
        gc.enable()
    assert before == [0] * found.tries
    assert found.tries >= 3


def test_it_begins_below_a_guess_that_the_free_memory_cannot_hold(
    network: Any, device: Callable[[int], Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = largest.time_filled

    def time_filled(policy: Policy, model: Any, some: Tensor, batch: int, bench: Any) -> Any:
        asked.append(batch)
        return original(policy, model, some, batch, bench)

    monkeypatch.setattr(largest, "time_filled", time_filled)
    memory = device(SMALL)
    find_largest(PLAN, network, prompt(), memory, 10_000, Bounds(tries=1))
    assert asked == [SMALL // sequence_bytes(PLAN, 70, 8, Growth(64))]


def test_a_method_without_column_sums_is_filled_too(
    network: Any, device: Callable[[int], Memory]
) -> None:
    policy = Policy.uniform(Option(StreamingLLM(), Budget(tokens=16)), 3, 2)
    assert find_largest(policy, network, prompt(), device(10**6), 3, Bounds(tries=1)).batch == 3


# --- weights that stay where they are ------------------------------------------------------------


def test_joined_weights_are_laid_out_once() -> None:
    linears = [nn.Linear(8, rows) for rows in (6, 2, 2)]
    before = [linear.weight.detach().clone() for linear in linears]
    once = _side_by_side([linear.weight for linear in linears])
    again = _side_by_side([linear.weight for linear in linears])
    assert once.data_ptr() == again.data_ptr() == linears[0].weight.data_ptr()
    assert torch.equal(once, again)
    assert torch.equal(again, torch.cat(before))
    for linear, weight in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, weight)


def test_neighbours_in_another_order_are_laid_out_anew() -> None:
    first, second = (nn.Linear(8, 4).weight for _ in range(2))
    _side_by_side([first, second])
    expected = torch.cat([second.detach(), first.detach()])
    assert torch.equal(_side_by_side([second, first]), expected)
