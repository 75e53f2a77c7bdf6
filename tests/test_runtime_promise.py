"""A plan is run whole within its limit, on a device whose memory is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.option import Budget, Option
from kvtune.policies.page_formats import BF16_PAGE, PAGE
from kvtune.policies.paging import Growth, head_pages
from kvtune.policies.policy import Policy
from kvtune.runtime import promise
from kvtune.runtime.admission import read_different
from kvtune.runtime.graph import DecodeLoop
from kvtune.runtime.promise import run_within
from kvtune.traces.models import wrap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PLAN = Policy.uniform(Option(H2O(), Budget(share=0.5), Int4(), Int4()), 3, 2, name="plan")
OUTSIDE, LIMIT = 1000, 5000


class MadeUpBench:
    """Says what it is told to, and notes in which order it is asked."""

    def __init__(self, reserved: int) -> None:
        self.reserved, self.events = reserved, list[str]()
        self.loaded = 0  # beside the allocator, since the cap was set

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        return 7.0

    def forget_peak(self) -> None:
        self.events.append("forget")

    def release(self) -> None:
        self.events.append("release")

    def look(self) -> None:
        self.events.append("look")

    def peak_bytes(self) -> int:
        return self.reserved - 10

    def reserved_bytes(self) -> int:
        return self.reserved

    def device_bytes(self) -> int | None:
        return 2 * self.reserved

    def available_bytes(self) -> int:
        raise AssertionError("nobody asks")

    def outside_bytes(self) -> int:
        return OUTSIDE + self.loaded

    @contextmanager
    def capped(self, limit_bytes: int) -> Iterator[int]:
        self.events.append(f"capped at {limit_bytes}")
        yield OUTSIDE
        self.events.append("free")


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return wrap(make_network(LlamaConfig(**tiny_fields), tried=True), None, name="tiny").model


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sequences and tokens of every loop that has ended."""
    found, run = list[tuple[int, int]](), DecodeLoop.run

    def watched(self: DecodeLoop, ends: tuple[int, ...] = ()) -> Tensor:
        tokens = run(self, ends)
        found.append((tokens.shape[0], tokens.shape[1]))
        return tokens

    monkeypatch.setattr(DecodeLoop, "run", watched)
    return found


def prompts(batch: int, tokens: int) -> Tensor:
    return torch.randint(2, 250, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_all_that_was_printed_runs_to_its_end(network: Any, loops: list[tuple[int, int]]) -> None:
    bench, before = MadeUpBench(LIMIT - OUTSIDE), network.config._attn_implementation
    found = run_within(PLAN, network, prompts(5, 200), 70, LIMIT, bench)
    assert loops[-1] == (5, 70)
    assert (found.batch, found.prompt_tokens, found.new_tokens) == (5, 200, 70)
    assert found.finished
    assert found.kept
    assert found.process_bytes == LIMIT
    assert (found.device_bytes, found.seconds) == (2 * (LIMIT - OUTSIDE), 7.0)
    assert network.config._attn_implementation == before
    pages = head_pages(Option(H2O(), Budget(), Int4(), Int4()), 100, 200, 8, Growth(70))
    assert found.page_bytes == 5 * 6 * sum(n * x.page_bytes for x, n in pages.items())


def test_the_limit_holds_for_the_whole_run_and_for_no_other(network: Any) -> None:
    bench = MadeUpBench(100)
    run_within(PLAN, network, prompts(2, 200), 3, LIMIT, bench)
    assert bench.events == [
        "look", "release", f"capped at {LIMIT}", "look", "look", "free", "release",
    ]  # fmt: skip


def test_a_plan_that_runs_out_of_memory_is_no_error(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = read_different

    def full(model: Any, cache: Any, ids: Tensor) -> Tensor:
        if len(ids) > 1:  # the warm-up has one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, cache, ids)

    monkeypatch.setattr(promise, "read_different", full)
    found = run_within(PLAN, network, prompts(3, 90), 4, LIMIT, MadeUpBench(100))
    assert not found.finished
    assert not found.kept
    assert (found.page_bytes, found.seconds) == (None, None)


def test_a_process_that_takes_more_than_its_limit_has_not_kept_it(network: Any) -> None:
    found = run_within(PLAN, network, prompts(1, 90), 4, LIMIT, MadeUpBench(LIMIT))
    assert found.finished
    assert not found.kept


def test_what_was_loaded_during_the_run_counts_too(network: Any) -> None:
    bench = MadeUpBench(LIMIT - OUTSIDE)
    bench.loaded = 1
    found = run_within(PLAN, network, prompts(1, 90), 4, LIMIT, bench)
    assert found.process_bytes == LIMIT + 1
    assert not found.kept


def test_pages_of_a_head_are_counted_in_whole_pages_of_both_kinds() -> None:
    option = Option(H2O(), Budget(), Int4(exact_first=4), Int4(exact_first=4))
    for kept, new in ((4, 0), (5, 0), (68, 60), (69, 61), (200, 64)):
        pages = head_pages(option, kept, 300, 64, Growth(new))
        by_code = {getattr(layout, "keys", ""): count for layout, count in pages.items()}
        assert by_code.get("int4", 0) == -(-(kept - 4) // PAGE)
        assert by_code.get("bf16", 0) == -(-(4 + new) // BF16_PAGE)
