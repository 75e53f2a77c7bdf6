"""Tuning decode attention without a GPU: times are made up, files and look-up are real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Silent
from kvtune.policies.page_formats import AS_VALUES, CODES
from kvtune.policies.pages import PageLayout
from kvtune.profiles.gpus import list_gpus
from kvtune.profiles.measured import Capture
from kvtune.profiles.tuned import (
    KINDS,
    TUNED_FILE,
    TunedKernels,
    TunedShape,
    find_tuned,
    keep_tuned,
    parse_tuned,
    tuned_document,
)
from kvtune.runtime.kernels.launch import BUILT_IN, Shape, shape_for
from kvtune.runtime.kernels.tiles import TABLE_AHEAD, block_costs, kind_of
from kvtune.runtime.measure.operation import Work
from kvtune.runtime.measure.paged_layer import Run, random_layer
from kvtune.runtime.measure.timer import Timing
from kvtune.runtime.measure.tune import TRIED, Case, cases, timed_by, tune, tune_class
from kvtune.runtime.measure.tune_session import tune_kernels

CAPTURE = Capture("0.1.0", "2.11", "13.0", "580", "NVIDIA H100 80GB HBM3", "kvtune profile", "day")
NAMES = [field.name for field in fields(Shape)]
BF16, INT4 = PageLayout(128).code, PageLayout(128, "int4", "int4").code
BEST = TunedShape({"warps": 2, "stages": 4, "programs": 792}, 0.9, ("one", "other"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No look-up of another test is remembered, nor any that this machine keeps."""
    from kvtune.profiles import tuned

    monkeypatch.setenv("KVTUNE_CACHE", str(tmp_path / "cache"))
    for remembered in (tuned._found, shape_for):
        remembered.cache_clear()
    yield
    for remembered in (tuned._found, shape_for):
        remembered.cache_clear()


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CAPTURE.device)


# --- the file ------------------------------------------------------------------------------------


def test_what_is_written_is_read_again() -> None:
    written = TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): BEST, ("floats", 64): BEST})
    assert parse_tuned(tuned_document(written), TUNED_FILE, NAMES) == written


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("stages: 4", "stagse: 4", "'decode_attention.mixed.128.shape.stagse' is no known key"),
        ("stages: 4", "stages: 0", "'decode_attention.mixed.128.shape.stages' must be at least 1"),
        ("stages: 4", "stages: two", "must be a whole number, not 'two'"),
        ("mixed:", "both:", "'decode_attention.both' is no known key"),
        ("128:", "wide:", "must stand under a head dimension"),
        ("time_share: 0.9", "time_share: 0", "must be above zero"),
        ("driver: '580'", "drivers: '580'", "'capture.drivers' is no known key"),
    ],
)
def test_a_mistake_is_refused_with_file_line_and_key(old: str, new: str, says: str) -> None:
    text = tuned_document(TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): BEST}))
    assert old in text
    with pytest.raises(KvtuneError) as caught:
        parse_tuned(text.replace(old, new), "my/kernels.yaml", NAMES)
    assert says in caught.value.message
    assert (caught.value.where or "").startswith("my/kernels.yaml:")


def test_every_shipped_file_fits_the_kernel_as_it_is() -> None:
    for device in (name for gpu in list_gpus() for name in gpu.device_names):
        found = find_tuned(device, NAMES)
        for (kind, _), best in (found.decode if found else {}).items():
            assert kind in KINDS
            assert 0 < best.time_share <= 1


def test_what_this_machine_measured_is_found_by_the_drivers_name() -> None:
    assert find_tuned("a card that nobody knows", NAMES) is None
    place = keep_tuned(TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): BEST}))
    found = find_tuned(CAPTURE.device, NAMES)
    assert found is not None
    assert found.decode == {("mixed", 128): BEST}
    assert Path(place).is_file()
    assert find_tuned("a card that nobody knows", NAMES) is None


# --- the look-up ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_h100")
def test_a_tuned_class_is_launched_so_and_the_others_as_built_in() -> None:
    one = replace(BEST, shape={"warps": 4, "programs": 792})
    keep_tuned(TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): one}))
    assert shape_for((BF16, INT4), 128) == replace(BUILT_IN, warps=4, programs=792)
    assert shape_for((BF16, INT4), 64) == BUILT_IN
    assert shape_for((BF16,), 128) == BUILT_IN


def test_without_a_gpu_the_built_in_shape_is_taken() -> None:
    keep_tuned(TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): BEST}))
    assert shape_for((BF16, INT4), 128) == BUILT_IN


@pytest.mark.usefixtures("on_h100")
def test_a_parameter_that_the_kernel_has_not_is_refused_when_it_is_launched() -> None:
    other = replace(BEST, shape={"clusters": 2})
    place = keep_tuned(TunedKernels("h100-sxm", CAPTURE, {("mixed", 128): other}))
    with pytest.raises(KvtuneError, match=r"'decode_attention.mixed.128.shape.clusters'") as caught:
        shape_for((BF16, INT4), 128)
    assert (caught.value.where or "").startswith(place)


@pytest.mark.parametrize(
    ("formats", "kind"),
    [
        (["bf16"], "floats"),
        (["bf16", "fp8"], "floats"),
        (["int4", "int2"], "integers"),
        (["int8", "bf16"], "mixed"),
    ],
)
def test_layers_are_told_apart_by_whether_integers_occur(formats: list[str], kind: str) -> None:
    assert kind_of(tuple(PageLayout(128, form, form).code for form in formats)) == kind


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("values", CODES)
def test_keys_by_token_take_the_room_and_the_time_of_keys_by_channel(
    head_dim: int, values: str
) -> None:
    for name in ("int8", "int4", "int2"):
        two = [PageLayout(head_dim, keys, values) for keys in (name, name + AS_VALUES)]
        assert two[0].code != two[1].code
        assert two[0].page_bytes == two[1].page_bytes
        assert [PageLayout.of(head_dim, layout.code) for layout in two] == two
        assert len({float(block_costs(np.array([layout.code]))[0]) for layout in two}) == 1
        assert kind_of([layout.code for layout in two]) == "integers"


# --- the search ----------------------------------------------------------------------------------


class Clock:
    """Says how long launches take, and counts them."""

    def __init__(self, factor: Callable[[Shape], float]) -> None:
        self.factor = factor
        self.asked: list[tuple[str, Shape]] = []

    def __call__(self, case: Case, shape: Shape) -> float:
        self.asked.append((case.name, shape))
        return len(case.name) * self.factor(shape)


def layers() -> list[Case]:
    rows = [Run(row, PageLayout(128, "int4", "int4"), 200) for row in range(4)]
    return [Case("small", rows), Case("a larger one", rows)]


def distance(shape: Shape) -> float:
    """Least for 4 warps, 2 stages and 792 programs."""
    programs = shape.programs or 1056
    return 1 + abs(shape.warps - 4) + abs(shape.stages - 2) + abs(math.log(programs / 792))


def test_every_parameter_of_the_kernel_is_tried() -> None:
    assert sorted(TRIED) == sorted(NAMES)
    for name, values in TRIED.items():
        assert getattr(Shape(), name) in values


def test_the_best_of_every_parameter_is_found_and_nothing_timed_twice() -> None:
    clock = Clock(distance)
    found = tune_class(layers(), clock, lambda: True)
    assert found is not None
    assert found.shape.items() >= {"warps": 4, "stages": 2, "programs": 792}.items()
    assert found.time_share == pytest.approx(1 / distance(BUILT_IN), abs=1e-4)
    assert found.layers == ("small", "a larger one")
    assert len(clock.asked) == len(set(clock.asked))


def test_a_gain_within_the_noise_changes_nothing() -> None:
    found = tune_class(layers(), Clock(lambda s: 1.0 if s == BUILT_IN else 0.995), lambda: True)
    assert found is not None
    assert (Shape(**found.shape), found.time_share) == (BUILT_IN, 1.0)


def test_a_shape_that_does_not_run_is_not_chosen() -> None:
    clock = Clock(lambda s: math.inf if s.warps > 1 else distance(s))
    found = tune_class(layers(), clock, lambda: True)
    assert found is not None
    assert found.shape["warps"] == 1
    assert tune_class(layers(), Clock(lambda s: math.inf), lambda: True) is None
    assert found.shape["stages"] == 2 != BUILT_IN.stages


def test_a_class_that_time_did_not_suffice_for_is_left_out() -> None:
    turns = iter([True] * 22)
    assert tune(128, KINDS, Clock(distance), lambda: next(turns, False)).keys() == {
        ("floats", 128)
    }  # fmt: skip


def test_cases_are_of_every_kind_and_larger_than_nothing() -> None:
    for head_dim in (64, 128):
        made = cases(head_dim)
        assert {kind_of(case.pairs) for case in made} == set(KINDS)
        assert len({case.name for case in made}) == len(made)
        assert all(case.held_bytes > 2**20 for case in made)


# --- layers, and what is kept --------------------------------------------------------------------


def test_pages_of_a_random_layer_do_not_overlap() -> None:
    layouts = [PageLayout(64, form, form) for form in ("int4", "bf16", "int2")]
    runs = [Run(row, layouts[row % 3], 70 + 100 * row) for row in range(6)]
    runs += [Run(row, layouts[1], 30) for row in range(6)]
    made = random_layer(runs, 2, "cpu", programs=20)
    sizes = np.concatenate([[run.layout.page_cells] * run.pages for run in runs])
    starts = made.paged.table[:-TABLE_AHEAD].numpy()
    order = np.argsort(starts)
    assert (starts[order][1:] == (starts + sizes)[order][:-1]).all()
    assert made.paged.pool.nbytes == sizes.sum() * PageLayout(64).cell_bytes
    assert made.paged.lengths.tolist() == [run.tokens for run in runs]
    assert made.query.shape == (6, 2, 64)
    assert all(run.pages == -(-run.tokens // run.layout.page_tokens) for run in runs)
    held = sum(run.pages * run.layout.page_tokens for run in runs)
    assert made.paged.tiles[:, 4].sum() == held


def test_cold_launches_of_a_shape_are_timed_and_failures_are_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvtune.runtime.measure import tune as module

    seen: list[int] = []

    def timer(work: Work, execution: str, watch: Callable[[], None]) -> Timing:
        seen.append(len(work.calls))
        if len(seen) > 1:
            raise RuntimeError("out of resource: shared memory")
        return Timing(1.0, 2.0, 3.0, 5)

    (case, _) = layers()
    monkeypatch.setattr(module, "ROTATION_BYTES", 5 * case.held_bytes)
    seconds = timed_by(timer, "cpu")
    assert seconds(case, Shape(programs=8)) == pytest.approx(2e-6)
    assert seconds(case, Shape()) == math.inf
    assert seen == [5, 5]


@pytest.mark.usefixtures("on_h100")
def test_a_folder_is_gone_on_with_and_the_runtime_launches_so(tmp_path: Path) -> None:
    def run(dims: list[int], seconds: float) -> tuple[dict[tuple[str, int], TunedShape], Clock]:
        clock = Clock(distance)
        found = tune_kernels(
            tmp_path, "h100-sxm", dims, CAPTURE, seconds, Silent(), clock
        )  # fmt: skip
        return found, clock

    assert shape_for((BF16,), 128) == BUILT_IN
    nothing, unasked = run([128], 20.0)
    assert (nothing, unasked.asked) == ({}, [])
    assert not (tmp_path / TUNED_FILE).exists()
    first, _ = run([128], math.inf)
    assert first.keys() == {(kind, 128) for kind in KINDS}
    assert shape_for((BF16,), 128) == Shape(warps=4, stages=2, programs=792)
    both, clock = run([128, 64], math.inf)
    assert both.keys() == {(kind, dim) for kind in KINDS for dim in (64, 128)}
    assert {key: both[key] for key in first} == first
    again, idle = run([128, 64], math.inf)
    assert (again.keys(), idle.asked) == (both.keys(), [])
    assert clock.asked


def test_without_triton_nothing_is_tuned_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert tune_kernels(tmp_path, "h100-sxm", [128], CAPTURE, 9.0, Told()) == {}
    assert "need Triton" in said[0]
