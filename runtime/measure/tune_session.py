"""Tunes what a profile directory does not hold yet, and keeps it for this machine's runtime."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from kvtune.common.files import write_text
from kvtune.common.progress import Progress
from kvtune.profiles.measured import Capture
from kvtune.profiles.tuned import (
    KINDS,
    TUNED_FILE,
    Class,
    TunedKernels,
    TunedShape,
    keep_tuned,
    parse_tuned,
    tuned_document,
)
from kvtune.runtime.kernels.launch import Shape, shape_for
from kvtune.runtime.measure.timer import cuda_timer
from kvtune.runtime.measure.tune import Seconds, timed_by, tune

LEAST_SECONDS = 30.0
"""In less, hardly one class would be finished: compiling takes most of it."""


def tune_kernels(
    folder: Path,
    slug: str,
    head_dims: Sequence[int],
    capture: Capture,
    seconds: float,
    progress: Progress,
    time_of: Seconds | None = None,
) -> dict[Class, TunedShape]:
    """The best shapes of decode attention, those included that the folder has already.

    Args:
        folder: they are written to.
        slug: of the card.
        head_dims: of the layers to tune for, the most useful first.
        capture: how and when.
        seconds: bound; what it does not suffice for is left out, with too few everything.
        progress: told of every head dimension.
        time_of: times a launch; on the GPU unless given.

    Raises:
        KvtuneError: what the folder has is not as it must be.
    """
    if time_of is None and importlib.util.find_spec("triton") is None:
        progress.note("decode attention is not tuned: its kernels need Triton")
        return {}
    if seconds < LEAST_SECONDS:
        progress.note(f"decode attention is not tuned: {seconds:.0f} s are too few")
        return _read(folder / TUNED_FILE)
    file, end = folder / TUNED_FILE, time.monotonic() + seconds
    time_of = time_of or timed_by(cuda_timer, "cuda")
    found = _read(file)
    wanted = {dim: [kind for kind in KINDS if (kind, dim) not in found] for dim in head_dims}
    wanted = {dim: kinds for dim, kinds in wanted.items() if kinds}
    for dim in progress.track(list(wanted), "tuning decode attention", len(wanted)):
        found |= tune(dim, wanted[dim], time_of, lambda: time.monotonic() < end)
        _write(file, TunedKernels(slug, capture, found))
    return found


def _read(file: Path) -> dict[Class, TunedShape]:
    if not file.is_file():
        return {}
    names = [field.name for field in fields(Shape)]
    return dict(parse_tuned(file.read_text(encoding="utf-8"), str(file), names).decode)


def _write(file: Path, tuned: TunedKernels) -> None:
    if tuned.decode:
        write_text(file, tuned_document(tuned))
        keep_tuned(tuned)
        shape_for.cache_clear()
