"""Timing in the paged runtime: everything but the clock, which is made up here."""

from __future__ import annotations

import dataclasses
import gc
import os
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.kitty import Kitty
from kvtune.policies.method import methods
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime import timing
from kvtune.runtime.admission import read_prompts
from kvtune.runtime.device import CudaBench, bench_for, collecting_little
from kvtune.runtime.largest import Bounds, Largest
from kvtune.runtime.measure.monitor import NoMonitor, NvmlMonitor
from kvtune.runtime.timing import NEW_TOKENS, STRETCHES, Beside, Decoding, Timing, time_beside
from kvtune.traces.models import wrap
from kvtune.traces.samples import Sample
from kvtune.tuner.timing import _known, time_plan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:kvtune's kernels need"),
]

PLAN = Policy.uniform(Option(H2O(), Budget(share=0.5), Int4(), Int4()), 3, 2, name="plan")
SECONDS = [9.0, 1.0, 3.0, *(16.0 * n for n in range(1, STRETCHES + 1))]
"""Of one policy: three prefills, of which the first compiles; then stretches of 16 steps."""


class MadeUpBench:
    """Runs every call and says what it is told to; memory is what the calls have reached."""

    def __init__(self, seconds: list[float], fits: int = 99) -> None:
        self.script, self.fits = list(seconds), fits
        self.calls, self.forgotten = 0, 0
        self.released: list[int] = []
        self.looked: list[int] = []

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return self.script.pop(0)

    def forget_peak(self) -> None:
        self.forgotten = self.calls

    def release(self) -> None:
        self.released.append(self.calls)

    def look(self) -> None:
        self.looked.append(self.calls)

    def reserved_bytes(self) -> int:
        return self.peak_bytes()

    def outside_bytes(self) -> int:
        return 0

    def capped(self, limit_bytes: int) -> AbstractContextManager[int]:
        return nullcontext(0)

    def available_bytes(self) -> int:
        raise AssertionError("only the search for the largest batch asks")

    def device_bytes(self) -> int | None:
        return 2000 * self.calls

    def peak_bytes(self) -> int:
        return 1000 * self.calls


@pytest.fixture
def network(make_network: Callable[..., Any], tiny_fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return wrap(make_network(LlamaConfig(**tiny_fields), tried=True), None, name="tiny").model


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at once instead of sixteen; the plain backend is slow."""
    monkeypatch.setattr(timing, "STEPS", 1)


def prompts(batch: int, tokens: int = 70) -> Tensor:
    return torch.randint(2, 250, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_both_caches_are_timed_and_the_model_is_given_back(network: Any) -> None:
    bench = MadeUpBench(2 * SECONDS)
    found = time_beside(PLAN, network, prompts(2), bench)
    assert (found.prompt_tokens, bench.script) == (70, [])
    assert bench.released == [0, 3 + STRETCHES]  # before each of the two
    assert bench.looked == [3, 6 + STRETCHES]  # when its prompts are read, before it is captured
    assert (found.plan.batch, found.full_cache.batch) == (2, 2)
    stretches = 16.0 * np.arange(1, STRETCHES + 1)
    for one in (found.plan, found.full_cache):
        assert (one.prefill.value, one.prefill.unit, one.prefill.tier) == (2, "s", "measured")
        assert one.step.value == np.median(stretches)
        assert [one.step.low, one.step.high] == pytest.approx(np.quantile(stretches, [0.1, 0.9]))
        assert one.tokens_per_second.value == 2 / one.step.value
        assert one.tokens_per_second.low == 2 / one.step.high < one.tokens_per_second.value
    assert found.plan.prompt_bytes == 2 * PLAN.footprint(70, 8)
    assert found.plan.page_bytes > found.plan.prompt_bytes
    assert found.plan.device_bytes == 2 * found.plan.peak_bytes == 2000 * bench.calls
    assert found.full_cache.prompt_bytes > found.plan.prompt_bytes
    assert network.config._attn_implementation == "kvtune"


def test_a_few_prompts_stand_for_a_batch_when_prefills_are_timed(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six prompts by two take three times as long; what decodes holds all six."""
    read: list[int] = []

    def counted(model: Any, cache: Any, some: Tensor) -> Tensor:
        read.append(len(some))
        return read_prompts(model, cache, some)

    monkeypatch.setattr(timing, "read_prompts", counted)
    monkeypatch.setattr(timing, "FEW_PROMPTS", 2)
    monkeypatch.setattr(timing, "PREFILL_CHUNK_TOKENS", 100)
    found = timing.time_policy(PLAN, network, prompts(6), MadeUpBench(SECONDS))
    assert read == [2, 2, 2]
    assert (found.prefill.value, found.batch) == (np.median([3 * 1.0, 3 * 3.0]), 6)
    assert found.prompt_bytes == 6 * PLAN.footprint(70, 8)


def test_every_stretch_is_as_many_steps_as_it_is_divided_by(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch of s steps that takes s seconds is one second a step, whatever s."""
    from kvtune.runtime.graph import DecodeLoop

    advanced: list[int] = []
    original = DecodeLoop.advance

    def advance(loop: DecodeLoop, steps: int) -> None:
        advanced.append(steps)
        original(loop, steps)

    monkeypatch.setattr(timing, "STEPS", 3)
    monkeypatch.setattr(DecodeLoop, "advance", advance)
    bench = MadeUpBench([1.0] * 3 + [3.0] * STRETCHES)
    found = timing.time_policy(PLAN, network, prompts(1), bench)
    assert advanced == [3] * (1 + STRETCHES)
    assert (found.step.value, found.step.low, found.step.high) == (1, 1, 1)
    assert bench.forgotten == 3  # the peak is that of the whole batch's prompts and what follows


def test_the_batch_is_halved_until_the_uncompressed_cache_fits(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []
    one = Estimate(1.0, 1.0, 1.0, "s", "measured")

    def time_policy(policy: Policy, model: Any, some: Tensor, bench: Any) -> Timing:
        tried.append((policy.name, len(some)))
        if len(some) > (3 if policy.name == "plan" else 1):
            raise torch.OutOfMemoryError
        return Timing(len(some), one, one, 3, None, 1, 1, one)

    monkeypatch.setattr(timing, "time_policy", time_policy)
    found = time_beside(PLAN, network, prompts(5), MadeUpBench([]))
    whole = "uncompressed"
    assert tried == [(whole, 5), (whole, 2), (whole, 1), ("plan", 1)]
    assert (found.plan.batch, found.full_cache.batch) == (1, 1)
    monkeypatch.setattr(timing, "unless_full", lambda _: None)
    with pytest.raises(KvtuneError, match="not one prompt of 70"):
        time_beside(PLAN, network, prompts(5), MadeUpBench([]))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (Option(H2O(), Budget(share=0.5), Kitty(), Kitty()), "stores no kitty"),
        (Option(methods()["kvzip"](), Budget(share=0.5)), "repeat its prompt"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_runs(
    network: Any, option: Option, reason: str
) -> None:
    bench = MadeUpBench([])
    with pytest.raises(KvtuneError, match=reason):
        time_beside(Policy.uniform(option, 3, 2), network, prompts(1), bench)
    assert bench.calls == 0
    assert network.config._attn_implementation == "kvtune"


def test_ratios_are_plan_to_uncompressed() -> None:
    def made_up(seconds: float, peak: int, pages: int) -> Timing:
        one = Estimate(seconds, seconds, seconds, "s", "measured")
        twice = dataclasses.replace(one, value=2 * seconds)
        return Timing(1, twice, one, peak, None, pages, pages, one)

    beside = Beside(1, made_up(1, 60, 10), made_up(4, 100, 50))
    expected = {
        "prefill": 0.25,
        "step": 0.25,
        "tokens_per_second": 0.25,
        "page_bytes": 0.2,
        "peak_bytes": 0.6,
    }
    assert beside.ratios == pytest.approx(expected | {"peak_saved": 1.0})


def test_a_processor_times_nothing() -> None:
    with pytest.raises(KvtuneError, match="no GPU here"):
        bench_for("cpu")


class Monitored(NoMonitor):
    def __init__(self, *used: int | None) -> None:
        self.used = list(used)

    def used_bytes(self) -> int | None:
        return self.used.pop(0)


def test_the_device_is_as_full_as_it_was_seen_to_be_most() -> None:
    bench = CudaBench(Monitored(5, 9, 7))
    bench.look()
    bench.look()
    assert bench.device_bytes() == 9
    assert CudaBench(Monitored(None)).device_bytes() is None  # NVML is missing


def test_a_limit_is_this_process_own_on_a_card_that_others_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shared(NoMonitor):
        def others_bytes(self) -> int:
            return 30

    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    with CudaBench(Shared()).capped(16) as outside:
        assert outside == 40 - 30 - 4
    assert shares == [pytest.approx(0.10), 1.0]  # 16 less the 6 beside the allocator


@pytest.mark.parametrize("own", [True, False])
def test_others_are_known_where_the_driver_names_this_process(own: bool) -> None:
    named = [
        types.SimpleNamespace(pid=-1, usedGpuMemory=7),
        types.SimpleNamespace(pid=-2, usedGpuMemory=None),
    ]
    mine = [types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=5)] if own else []
    nvml = types.SimpleNamespace(
        NVMLError=OSError,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: named + mine,
    )
    assert NvmlMonitor(nvml).others_bytes() == (7 if own else 0)


def test_garbage_is_gone_before_the_allocator_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    order: list[str] = []
    ring = weakref.ref(Ring())
    assert ring() is not None
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name: order.append(f"{name}, garbage: {ring()}")
        )
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: order.append("cublas"), raising=False
    )
    bench = CudaBench(Monitored(9, 4))
    bench.look()
    bench.release()
    assert order == [
        "synchronize, garbage: None",
        "cublas",
        "empty_cache, garbage: None",
        "reset_peak_memory_stats, garbage: None",
    ]
    assert bench.device_bytes() == 4  # looked for anew


# --- beside the prediction -----------------------------------------------------------------------


def sample(*tokens: int) -> Sample:
    return Sample("a", "evaluate", "prose", tokens, 0, 2, (-1, -1))


ONE = Estimate(1.0, 1.0, 1.0, "s", "measured")
GIB = 1 << 30


def planned(
    network: Any,
    monkeypatch: pytest.MonkeyPatch,
    gpu: str | None = "h100",
    dtype: str = "bfloat16",
    largest: Bounds | None = None,
    context_tokens: int = 11,
) -> tuple[Any, list[list[int]], list[Any]]:
    """``time_plan``, the prompts it made and its searches, on a card that is said to be there."""
    seen: list[Tensor] = []
    searches: list[Any] = []

    def beside(policy: Policy, model: Any, some: Tensor, bench: Any) -> Beside:
        seen.append(some)
        one = Timing(2, ONE, ONE, GIB, None, 1, 1, ONE)
        return Beside(some.shape[1], one, dataclasses.replace(one, device_bytes=2 * GIB))

    def find(policy: Policy, model: Any, some: Tensor, bench: Any, guess: Any, bounds: Any) -> Any:
        searches.append((policy.name, some.tolist(), guess, bounds))
        many = 40 if policy.name == "plan" else 8
        rate = dataclasses.replace(ONE, value=float(many))
        return Largest(many, many + 1, 3, Decoding(many, ONE, rate, 1, None, 1, 1))

    def detect() -> Any:
        if gpu is None:
            raise KvtuneError("no profile")
        return find_gpu(gpu)

    monkeypatch.setattr("kvtune.tuner.timing.time_beside", beside)
    monkeypatch.setattr("kvtune.tuner.timing.find_largest", find)
    monkeypatch.setattr("kvtune.tuner.timing.detect_gpu", detect)
    loaded = dataclasses.replace(wrap(network, None, name="tiny"), dtype=dtype)
    policy = Policy.uniform(PLAN.heads[0][0], 30, 3, name="plan")
    texts = [sample(1, 2, 3, 4, 5), sample(6, 7, 8, 9)]
    times = time_plan(
        policy, loaded, find_model("smollm2-135m"), texts, batch=3,
        context_tokens=context_tokens,
        largest=largest, bench_of=lambda _: MadeUpBench([]),
    )  # fmt: skip
    return times, seen[0].tolist(), searches


def test_only_what_is_made_in_the_block_is_looked_through() -> None:
    """Garbage in cycles that is made there is found; what was there before is not looked at."""

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    before = weakref.ref(kept := Cycle())
    with collecting_little():
        inside = weakref.ref(Cycle())
        del kept
        gc.collect()
        assert inside() is None
        assert before() is not None
    gc.collect()
    assert before() is None


def test_prompts_are_the_samples_each_of_which_begins_as_many(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows, searches = planned(network, monkeypatch)
    first, second = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7]
    assert rows == [first, first, second]
    assert searches == []


def test_a_known_card_is_predicted_in_its_tier(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, _, _ = planned(network, monkeypatch, context_tokens=300)
    assert (times.gpu, times.most) == (find_gpu("h100").slug, None)
    plan, full = times.plan, times.full_cache
    assert plan.step.low <= plan.step.value <= full.step.value
    assert plan.step.tier != "measured"
    assert plan.tokens_per_second.value == pytest.approx(2 / plan.step.value)
    weights = 2 * find_model("smollm2-135m").parameters
    for one in (plan, full):
        assert weights < one.peak_bytes.low <= one.peak_bytes.value < one.device_bytes.value
    assert plan.peak_bytes.value < full.peak_bytes.value


def test_coverage_counts_measured_figures_inside_their_intervals(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step takes a second; NVML was there for the uncompressed cache alone."""
    times, _, _ = planned(network, monkeypatch)
    assert (times.coverage.inside, times.coverage.of) == (0, 4 + 5)
    near = Estimate(1.1, 1.0, 1.2, "s", "fitted")
    better = dataclasses.replace(times, plan=dataclasses.replace(times.plan, step=near))
    assert (better.coverage.inside, better.coverage.of) == (1, 9)


def test_the_largest_batches_are_looked_for_from_their_predictions(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = Bounds(tries=3)
    times, rows, searches = planned(network, monkeypatch, largest=bounds, context_tokens=300)
    predicted = times.most.predicted
    assert searches == [
        ("plan", rows[:1], int(predicted["plan"].batch.value), bounds),
        ("uncompressed", rows[:1], int(predicted["full_cache"].batch.value), bounds),
    ]
    for one in predicted.values():
        batch, rate = one.batch, one.tokens_per_second
        assert 0 < batch.low <= batch.value <= batch.high
        assert rate.low <= rate.value <= rate.high
    assert predicted["plan"].batch.low > predicted["full_cache"].batch.high
    assert times.most.ratios == {"batch": 5.0, "tokens_per_second": 5.0}
    assert times.coverage.of == 9 + 4


@pytest.mark.parametrize(("gpu", "dtype"), [(None, "bfloat16"), ("h100", "float32")])
def test_what_the_simulator_does_not_know_is_not_predicted(
    network: Any, monkeypatch: pytest.MonkeyPatch, gpu: str | None, dtype: str
) -> None:
    times, _, searches = planned(network, monkeypatch, gpu, dtype, Bounds())
    assert (times.plan, times.full_cache, times.coverage) == (None, None, None)
    assert times.most.predicted == {}
    assert [guess for _, _, guess, _ in searches] == [None, None]


def test_windows_longer_than_a_sequence_hinder_no_prediction() -> None:
    gemma = find_model("gemma-3-1b")
    window = min(w for w in gemma.windows if w)
    loaded: Any = types.SimpleNamespace(dtype="bfloat16")
    assert _known(gemma, loaded, window - NEW_TOKENS)
    assert not _known(gemma, loaded, window - NEW_TOKENS + 1)
