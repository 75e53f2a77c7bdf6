"""Steps and prefills of the runtime, learned from whole ones on a made-up card."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles.kernel_table import Point
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import runtime as latency_runtime
from kvtune.simulator.latency import steps as latency
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.pages import paged_attention
from kvtune.simulator.latency.parts import layer_rest, matrix_products, step_rest
from kvtune.simulator.latency.priors import NARROW_PAGES
from kvtune.simulator.latency.steps import decode_steps, prefills
from kvtune.simulator.latency.transfer import Tables, transferred
from kvtune.tests.made_up_card import H100, H200, KERNELS, LLAMA, ROWS, paged_rows, row


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The H100 as if it had been measured."""
    own = Tables(KERNELS, "measured", "h100-sxm")
    monkeypatch.setattr(latency, "tables_for", lambda gpu: own if gpu.slug == own.source else None)


def test_steps_of_the_runtime_are_learned_from_whole_ones(
    measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up runtime: a rest a layer, and attention as slow as pages say or twice as slow."""
    small = find_model("smollm2-135m")
    law_of = {LLAMA.name: (1.0, 7e-6), small.name: (2.0, 3e-6)}
    pages = list(paged_rows())
    kernels = Kernels((*ROWS, *pages))

    def right(shape: ModelShape, batch: float, sizes: dict[str, float]) -> float:
        factor, rest = law_of[shape.name]
        rows = np.array(batch)
        attention = paged_attention(
            kernels, shape, rows, {b: np.array(s) for b, s in sizes.items()}
        )
        floor = paged_attention(kernels, shape, rows, {})
        assert attention is not None
        assert floor is not None
        if shape.head_dim == 64:  # half of what the pages were measured with
            bits = {"bf16": 16, "int4": 4}
            numbers = {name: size / bits[name] for name, size in sizes.items()}
            narrow = 1 - numbers.get("bf16", 0) / sum(numbers.values())
            attention += (attention - floor) * narrow * (NARROW_PAGES.value - 1)
        matrices = shape.layers * matrix_products(kernels, shape, rows)
        head = kernels.linear(shape.vocab_size, shape.hidden_size, rows)
        return float(factor * attention + matrices + head + shape.layers * rest * (1 + batch))

    steps = [
        row(Point("runtime_step", "k", batch=batch, length=length, rows=shape.layers,
                  width_in=shape.hidden_size, width_out=shape.intermediate_size), 1,
            seconds=right(shape, batch, {"bf16": shape.kv_bytes(length)}))
        for shape in (LLAMA, small) for batch in (1, 4, 16) for length in (1024, 8192)
    ]  # fmt: skip
    tables = Tables(Kernels((*ROWS, *pages, *steps)), "measured", "h100-sxm")
    monkeypatch.setattr(latency, "tables_for", lambda gpu: tables)
    for shape in (LLAMA, small):
        cache = shape.kv_bytes(5000)
        plain = decode_steps(shape, H100, "bf16", 4, cache, "runtime").at()
        assert plain.value == pytest.approx(right(shape, 4, {"bf16": cache}), rel=1e-6)
        assert plain.tier == "interpolated"
        sizes = {"int4": cache / 8, "bf16": cache / 20}
        narrow = decode_steps(shape, H100, "bf16", 16, sizes, "runtime").at()
        assert narrow.value == pytest.approx(right(shape, 16, sizes), rel=1e-6)
        assert narrow.tier == "fitted"
        assert narrow.low < narrow.value < narrow.high
    between = find_model("llama-3.2-1b")
    factors = [each.factor for each in latency_runtime.learned_steps(tables.kernels)]
    assert factors == pytest.approx([2.0, 1.0])
    assert decode_steps(between, H100, "bf16", 4, 1e8, "runtime").tier == "fitted"


def test_an_empty_cache_is_read_no_slower_than_a_full_one(
    measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = row(Point("runtime_step", "k", batch=4, length=1024, rows=32, width_in=4096,
                     width_out=14336), 1, seconds=9e-3)  # fmt: skip
    tables = Tables(Kernels((*ROWS, *paged_rows(), step)), "measured", "h100-sxm")
    monkeypatch.setattr(latency, "tables_for", lambda gpu: tables)
    empty, little = (decode_steps(LLAMA, H100, "bf16", 4, n, "runtime").at() for n in (0.0, 1.0))
    assert empty.value == pytest.approx(little.value, rel=1e-6)


def test_beyond_the_batches_that_were_learned_from_small_modules_grow(
    measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = row(Point("runtime_step", "k", batch=16, length=1024, rows=32, width_in=4096,
                     width_out=14336), 1, seconds=9e-3)  # fmt: skip
    kernels = Kernels((*ROWS, *paged_rows(), step))
    monkeypatch.setattr(latency, "tables_for", lambda gpu: Tables(kernels, "measured", "h100-sxm"))
    steps = decode_steps(LLAMA, H100, "bf16", [16, 4096], 0.0, "runtime").value_s
    rows = np.array([16.0, 4096.0])
    head = kernels.linear(LLAMA.vocab_size, LLAMA.hidden_size, rows)
    matrices = np.diff(32 * matrix_products(kernels, LLAMA, rows) + head)
    rest = np.diff(32 * layer_rest(kernels, LLAMA, rows) + step_rest(kernels, LLAMA, rows))
    assert float(rest[0]) > 1e-4
    assert np.diff(steps) == pytest.approx(matrices + rest)


def test_as_many_steps_as_unknowns_say_nothing_of_the_fit() -> None:
    steps = [
        row(Point("runtime_step", "k", batch=batch, length=length, rows=32, width_in=4096,
                  width_out=14336), 1, seconds=9e-3)
        for batch, length in ((1, 1024), (4, 8192))
    ]  # fmt: skip
    (found,) = latency_runtime.learned_steps(Kernels((*ROWS, *paged_rows(), *steps)))
    assert found.factor == 1  # no batch has two lengths
    assert found.misfit == np.inf


def test_steps_of_one_length_leave_attention_as_pages_have_it() -> None:
    rest = 5e-6
    kernels = Kernels((*ROWS, *paged_rows()))
    batches, cache = np.array([1.0, 4.0]), np.full(2, float(LLAMA.kv_bytes(1024)))
    attention = paged_attention(kernels, LLAMA, batches, {"bf16": cache})
    head = kernels.linear(LLAMA.vocab_size, LLAMA.hidden_size, batches)
    matrices = 32 * matrix_products(kernels, LLAMA, batches) + head
    assert attention is not None
    steps = [
        row(Point("runtime_step", "k", batch=int(batch), length=1024, rows=32, width_in=4096,
                  width_out=14336), 1, seconds=float(seconds))
        for batch, seconds in zip(batches, attention + matrices + 32 * rest, strict=True)
    ]  # fmt: skip
    (found,) = latency_runtime.learned_steps(Kernels((*ROWS, *paged_rows(), *steps)))
    assert found.factor == 1
    assert found.rest_s == pytest.approx(rest)


def test_another_card_has_the_same_launches_and_reads_at_its_own_rate() -> None:
    steps = [
        row(Point("runtime_step", "k", batch=4, length=length, rows=32, width_in=4096,
                  width_out=14336), 16 * 10**9, seconds=8e-3 + length * 1e-7)
        for length in (1024, 8192)
    ]  # fmt: skip
    rows = (*ROWS, *paged_rows(), *steps)
    there = Kernels(transferred(rows, H100, H200))
    tables = Tables(there, "transferred", "h100-sxm", Kernels(rows))
    batch, cache = np.array(4.0), np.array(float(LLAMA.kv_bytes(4096)))
    found = latency_runtime.runtime_steps(tables, H200, LLAMA, "bf16", batch, {"bf16": cache})
    (learned,) = latency_runtime.learned_steps(Kernels(rows))
    attention = paged_attention(there, LLAMA, batch, {"bf16": cache})
    assert found is not None
    assert attention is not None
    head = there.linear(LLAMA.vocab_size, LLAMA.hidden_size, batch)
    matrices = 32 * matrix_products(there, LLAMA, batch) + head
    expected = learned.factor * attention + matrices + 32 * learned.rest_s[0]
    assert found.value == pytest.approx(float(expected))


def test_prefills_of_the_runtime_take_so_many_times_their_parts(
    measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, between = find_model("smollm2-135m"), find_model("llama-3.2-1b")

    def parts(shape: ModelShape, prompt: int, batch: int) -> float:
        return prefills(shape, H100, "bf16", prompt, batch).at().value

    rows = [
        row(Point("runtime_prefill", "k", "eager", batch=3, length=length, rows=shape.layers,
                  width_in=shape.hidden_size, width_out=shape.intermediate_size), 1,
            seconds=ratio * parts(shape, length, 3))
        for shape, ratio in ((LLAMA, 1.2), (small, 1.6)) for length in (2048, 8192)
    ]  # fmt: skip
    tables = Tables(Kernels((*ROWS, *rows)), "measured", "h100-sxm")
    monkeypatch.setattr(latency, "tables_for", lambda gpu: tables)
    for shape, low, high in ((LLAMA, 1.2, 1.2), (small, 1.6, 1.6), (between, 1.25, 1.55)):
        taken = prefills(shape, H100, "bf16", 4096, 8, "runtime").at()
        assert low - 1e-6 < taken.value / parts(shape, 4096, 8) < high + 1e-6
        assert taken.low < taken.value < taken.high


def test_without_steps_of_the_runtime_plain_modules_answer(measured: None) -> None:
    cache = LLAMA.kv_bytes(4096)
    plain = decode_steps(LLAMA, H100, "bf16", 4, cache)
    assert decode_steps(LLAMA, H100, "bf16", 4, cache, "runtime").at() == plain.at()
    with pytest.raises(KvtuneError, match="runtime, graph, eager"):
        decode_steps(LLAMA, H100, "bf16", 4, cache, "quick")  # type: ignore[arg-type]
