"""Capturing long prompts: memory grows with their length, and tiles change no table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int4
from kvtune.simulator.quality.build import build_tables
from kvtune.tests.conftest import TINY, tiny_network
from kvtune.traces import capture as capturing
from kvtune.traces import signals
from kvtune.traces.capture import capture
from kvtune.traces.models import wrap
from kvtune.tuner.options import METHODS, Menu, alike

Make = Callable[..., Any]
OPTIONS = Menu(METHODS, (1 / 16, 1 / 4), alike((Bf16(), Int4()))).options()


@pytest.fixture(scope="module")
def long_model(tokenizer: Any) -> Any:
    """The tiny model with places for 32,768 tokens and more."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{**TINY, "max_position_embeddings": 40_000})
    return wrap(tiny_network(config), tokenizer, name="tiny-llama-long")


def peak_bytes(loaded: Any, sample: Any, folder: Path) -> int:
    """The most that torch holds at once for capturing a sample, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        capture(loaded, [sample], folder, probes=2, signals=("column_sums",), queries="observed")
    events = seen.profiler.kineto_results.events()
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def assert_linear(loaded: Any, make: Make, folder: Path, shortest: int) -> None:
    """Doubling a prompt twice adds twice as much the second time; a square would add four times."""
    peaks = [
        peak_bytes(loaded, make(1, tokens=shortest * times, observed=16)[0], folder / str(times))
        for times in (1, 2, 4)
    ]
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    assert first > 0
    assert 1.6 * first < second < 2.4 * first, peaks


def test_the_memory_of_a_capture_grows_with_the_prompt_and_not_with_its_square(
    long_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    assert_linear(long_model, make_samples, tmp_path, 1024)


@pytest.mark.full
def test_so_it_does_from_8k_to_32k_tokens(
    long_model: Any, make_samples: Make, tmp_path: Path
) -> None:
    assert_linear(long_model, make_samples, tmp_path, 8192)


def test_tables_do_not_depend_on_the_tiles_that_a_long_prompt_is_captured_in(
    long_model: Any, make_samples: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_samples(1, tokens=600, observed=24)

    def tables(name: str) -> Any:
        trace = capture(long_model, sample, tmp_path / name, probes=3, signals=("column_sums",))
        return build_tables(trace, OPTIONS)

    monkeypatch.setattr(signals, "_TILE_QUERIES", 10**6)
    whole = tables("whole")
    monkeypatch.setattr(signals, "_TILE_QUERIES", 7)
    monkeypatch.setattr(capturing, "_PROBE_BYTES", 1)  # one probe at a time
    streamed = tables("streamed")
    scale = abs(whole.factor).max()
    assert scale > 0
    torch.testing.assert_close(
        torch.as_tensor(streamed.factor), torch.as_tensor(whole.factor), rtol=1e-3,
        atol=1e-4 * float(scale),
    )  # fmt: skip
