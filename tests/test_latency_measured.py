"""Steps from measured kernels: a made-up card whose every kernel follows a known law."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.profiles.gpus import GpuProfile, find_gpu
from kvtune.profiles.kernel_table import KernelRow, Point, RowWriter
from kvtune.profiles.measured import parse_measured_gpu, read_measured
from kvtune.profiles.models import find_model
from kvtune.simulator.latency import compression, copies
from kvtune.simulator.latency import steps as latency
from kvtune.simulator.latency import transfer as transfer_module
from kvtune.simulator.latency.compression import policy_overhead
from kvtune.simulator.latency.copies import transfer
from kvtune.simulator.latency.kernels import Curve, Kernels
from kvtune.simulator.latency.parts import covers, decode_parts, layer_matrices
from kvtune.simulator.latency.priors import pages_as
from kvtune.simulator.latency.steps import decode_steps, prefills
from kvtune.simulator.latency.transfer import Tables, transferred
from kvtune.tests.made_up_card import (
    BATCHES,
    H100,
    H200,
    KERNELS,
    LLAMA,
    ROWS,
    law,
    paged_rows,
    row,
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Tables:
    """The H100 as if it had been measured, and the H200 as if it had not."""
    own = Tables(KERNELS, "measured", "h100-sxm")
    other = Tables(Kernels(transferred(ROWS, H100, H200)), "transferred", "h100-sxm")

    def tables_for(gpu: GpuProfile) -> Tables | None:
        return {"h100-sxm": own, "h200": other}.get(gpu.slug)

    monkeypatch.setattr(latency, "tables_for", tables_for)
    for module in (compression, copies):
        monkeypatch.setattr(module, "tables_for", tables_for)
    return own


def step(batch: int, tokens: float, gpu: GpuProfile = H100, **more: Any) -> Any:
    cache = LLAMA.kv_bytes_per_token() * tokens
    return decode_steps(LLAMA, gpu, more.pop("weights", "bf16"), batch, cache, **more).at()


# --- kernels ---------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(BATCHES), st.floats(1024, 65536))
def test_attention_between_lengths_follows_an_affine_law_exactly(batch: int, length: float) -> None:
    answer = float(KERNELS.attention((32, 8, 128), batch, length))
    assert answer == pytest.approx(law(4096 * batch * length), rel=1e-9)


def test_attention_beyond_the_longest_goes_on_at_the_last_slope() -> None:
    answer = float(KERNELS.attention((32, 8, 128), 16, 200_000))
    assert answer == pytest.approx(law(4096 * 16 * 200_000), rel=1e-9)


def test_a_larger_batch_than_any_measured_is_as_many_bytes() -> None:
    answer = float(KERNELS.attention((32, 8, 128), 64, 4096))
    assert answer == pytest.approx(law(4096 * 64 * 4096), rel=1e-9)


def test_heads_that_were_not_measured_are_taken_by_their_bytes() -> None:
    assert not KERNELS.has_heads((64, 4, 128))
    half = float(KERNELS.attention((64, 4, 128), 4, 8192))
    assert half == pytest.approx(float(KERNELS.attention((32, 8, 128), 4, 4096)))


def test_a_missing_corner_of_the_grid_is_continued_along_its_batch() -> None:
    holes = Kernels(r for r in ROWS if (r.point.batch, r.point.length) != (16, 65536))
    answer = float(holes.attention((32, 8, 128), 16, 65536))
    assert answer == pytest.approx(law(4096 * 16 * 65536), rel=1e-9)


def test_matrices_of_other_sizes_lie_between_those_measured() -> None:
    times = [float(KERNELS.linear(n, n, 1)) for n in (1024, 2048, 4096, 8192)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(law(2 * 1024**2))
    assert not KERNELS.has_linear(2048, 2048)


def test_a_matrix_between_others_is_asked_over_their_own_rows_first() -> None:
    """Large ones were measured at 1, 4 and 16 rows, small ones at 1 and 16 alone."""
    rows = [
        row(Point("linear", "k", rows=n, width_in=wide, width_out=wide), 2 * wide * wide)
        for wide, measured_at in ((1024, (1, 16)), (8192, (1, 4, 16)))
        for n in measured_at
    ]  # fmt: skip
    seconds = Kernels(rows).linear(2048, 2048, [1, 4, 16])
    assert seconds == pytest.approx(seconds[0])


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=2))
def test_a_curve_never_falls_where_its_points_rise(sizes: list[float]) -> None:
    curve = Curve(np.array([1.0, 10.0, 100.0]), np.array([1.0, 2.0, 50.0]))
    low, high = sorted(sizes)
    assert curve.at(low) <= curve.at(high)


def test_an_op_that_was_not_measured_is_named() -> None:
    with pytest.raises(KvtuneError, match="no measured 'linear'") as caught:
        Kernels(r for r in ROWS if r.point.op != "linear").linear(8, 8, 1)
    assert "goes on" in (caught.value.hint or "")


# --- steps -----------------------------------------------------------------------------------


def test_a_step_is_the_sum_of_its_kernels() -> None:
    batch, tokens = 4, 4096
    one = {
        "attention": law(4096 * batch * tokens),
        "matrices": sum(law(2 * o * i, 2 * batch * o * i) for o, i in layer_matrices(LLAMA)),
    }
    parts = decode_parts(KERNELS, LLAMA, np.array(float(batch)), np.array(float(tokens)))
    head = law(2 * LLAMA.vocab_size * 4096, 2 * batch * LLAMA.vocab_size * 4096)
    assert float(parts.attention) == pytest.approx(32 * one["attention"])
    assert float(parts.matrices) == pytest.approx(32 * one["matrices"] + head)
    assert float(parts.between) == 0
    assert float(parts.total) == pytest.approx(float(parts.attention + parts.matrices + parts.rest))


def test_what_whole_layers_take_beyond_their_parts_is_added() -> None:
    point = Point("decode_layers", "k", batch=4, query_heads=32, kv_heads=8, head_dim=128,
                  length=4096, rows=4, width_in=4096, width_out=14336)  # fmt: skip
    asked = (LLAMA, np.array(4.0), np.array(5000.0))
    quick, slow = (
        decode_parts(Kernels((*ROWS, row(point, 1, seconds=seconds))), *asked)
        for seconds in (1e-3, 3e-3)
    )
    assert float(slow.between - quick.between) == pytest.approx(32 * 2e-3)
    assert float(slow.total - quick.total) == pytest.approx(32 * 2e-3)
    assert slow.attention == quick.attention


def test_what_whole_steps_take_beyond_their_layers_is_added() -> None:
    """Three milliseconds at any length, and one more a layer for every thousand tokens."""
    heads: dict[str, Any] = {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 4,
                             "width_in": 4096, "width_out": 14336}  # fmt: skip
    layers = row(Point("decode_layers", "k", rows=4, length=2048, **heads), 1, seconds=1e-3)
    known = Kernels((*ROWS, layers))

    def whole(depth: int, length: int, beyond_s: float) -> KernelRow:
        shape = replace(LLAMA, layers=depth, windows=(None,) * depth)
        parts = decode_parts(known, shape, np.array(4.0), np.array(float(length)))
        point = Point("decode_step", "k", rows=depth, length=length, **heads)
        return row(point, 1, seconds=float(parts.total) + beyond_s)

    steps = (whole(32, 2048, 3e-3), whole(2, 2048, 1e-3), whole(2, 4048, 1e-3 + 2 * 2e-3))
    for tokens, beyond_s in ((1024, 3e-3), (2048, 3e-3), (5048, 3e-3 + 32 * 3e-3)):
        asked = (LLAMA, np.array(4.0), np.array(float(tokens)))
        plain, more = (decode_parts(k, *asked) for k in (known, Kernels((*ROWS, layers, *steps))))
        assert float(plain.ends) == 0
        assert float(more.total - plain.total) == pytest.approx(beyond_s)


@pytest.mark.parametrize(
    ("batch", "tokens", "tier"),
    [
        (4, 4096, "measured"),
        (4, 5000, "interpolated"),
        (3, 4096, "interpolated"),
        (4, 100_000, "fitted"),
        (64, 4096, "fitted"),
        (4, 100, "fitted"),
    ],
)
def test_every_step_says_its_tier(measured: Tables, batch: int, tokens: int, tier: str) -> None:
    answer = step(batch, tokens)
    assert answer.tier == tier
    assert answer.low < answer.value < answer.high


def test_intervals_widen_from_tier_to_tier(measured: Tables) -> None:
    answers = [step(4, 4096), step(4, 5000), step(4, 100_000), step(4, 4096, H200)]
    answers.append(step(4, 4096, measured=False))
    assert [a.tier for a in answers] == [
        "measured", "interpolated", "fitted", "transferred", "datasheet"
    ]  # fmt: skip
    widths = [(a.high - a.low) / a.value for a in answers]
    assert widths == sorted(widths)


def test_arrays_say_the_tier_of_each_and_the_worst_of_all(measured: Tables) -> None:
    cache = LLAMA.kv_bytes_per_token() * np.array([4096.0, 5000.0, 1e6])
    times = decode_steps(LLAMA, H100, "bf16", 4, cache)
    assert [times.at(i).tier for i in range(3)] == ["measured", "interpolated", "fitted"]
    assert times.tier == "fitted"
    assert times.at(1).value == step(4, 5000).value


def test_narrow_caches_and_weights_are_faster_and_no_longer_measured(measured: Tables) -> None:
    full = 32768.0 * LLAMA.kv_bytes_per_token()
    wide = decode_steps(LLAMA, H100, "bf16", 4, full).at()
    narrow = decode_steps(LLAMA, H100, "bf16", 4, {"int4": full / 4}).at()
    light = decode_steps(LLAMA, H100, "int4", 4, full).at()
    assert narrow.value < wide.value
    assert light.value < wide.value
    assert narrow.tier == light.tier == "fitted"
    assert narrow.low < narrow.value < narrow.high


def test_measured_pages_say_how_fast_a_narrow_cache_is(
    measured: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = Tables(Kernels((*ROWS, *paged_rows())), "measured", "h100-sxm")
    monkeypatch.setattr(latency, "tables_for", lambda gpu: paged)
    size, rest = 8192 * LLAMA.kv_bytes_per_token() / 4, step(8, 0).value
    narrow = decode_steps(LLAMA, H100, "bf16", 8, {"int4": size}).at()
    bf16_floor = 32 * float(KERNELS.attention((32, 8, 128), 8, 0))
    expected = 32 * 2 * law(8 * size / 32)
    assert narrow.value - rest + bf16_floor == pytest.approx(expected, rel=0.02)
    both = decode_steps(LLAMA, H100, "bf16", 8, {"int4": size / 2, "bf16": 2 * size}).at()
    assert narrow.value < both.value
    assert both.tier == "fitted"


def relative_width(found: Estimate) -> float:
    return (found.high - found.low) / found.value


def test_pages_that_were_not_measured_take_what_the_nearest_do_by_their_rates_elsewhere(
    measured: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pages(form: str, slower: float) -> list[KernelRow]:
        return [
            row(replace(each.point, number_format=form), each.bytes, seconds=slower * each.seconds)
            for each in paged_rows() if each.point.number_format == "int4"
        ]  # fmt: skip

    def asked(name: str, size: float) -> Estimate:
        return decode_steps(LLAMA, H100, "bf16", 8, {name: size}).at()

    size = 8192 * LLAMA.kv_bytes_per_token() / 2
    cases = {"fp8": "int8", "rotated_int4": "int4", "int3": "int4", "hqq2": "int2", "kitty": "int2"}
    for form, near in cases.items():
        found = []
        for own in ({}, {form: 9.0}):
            more = {"int8": 3.0, "int2": 0.5} | own
            rows = [each for name, slower in more.items() for each in pages(name, slower)]
            tables = Tables(Kernels((*ROWS, *paged_rows(), *rows)), "measured", "h100-sxm")
            monkeypatch.setattr(latency, "tables_for", lambda gpu, tables=tables: tables)
            as_near = asked(near, size * pages_as(form, near, "value"))
            found.append(asked(form, size))
        without, measured_itself = found
        assert without.tier == "fitted"
        assert without.value == pytest.approx(as_near.value)
        assert relative_width(without) > relative_width(as_near)
        assert measured_itself.value > without.value  # nine times slower than four bits
        assert relative_width(measured_itself) < relative_width(without)


def test_each_of_many_steps_is_answered_as_alone(measured: Tables) -> None:
    size = 8192.0 * LLAMA.kv_bytes_per_token()
    batch = np.array([1, 4, 4, 8, 32])
    cache = {
        "bf16": np.array([1.0, 0.0, 0.1, 0.2, 0.0]) * size,
        "int4": np.array([0.0, 0.25, 0.0, 0.2, 0.0]) * size,
        "gear": np.array([0.0, 0.0, 0.125, 0.1, 0.1]) * size,
    }
    for execution in ("graph", "runtime", "eager"):
        every = decode_steps(LLAMA, H100, "bf16", batch, cache, execution)
        for n, sequences in enumerate(batch.tolist()):
            own = {name: float(sizes[n]) for name, sizes in cache.items()}
            alone = decode_steps(LLAMA, H100, "bf16", sequences, own, execution).at()
            found = every.at(n)
            assert found.tier == alone.tier
            assert (found.value, found.low, found.high) == pytest.approx(
                (alone.value, alone.low, alone.high), rel=1e-6
            )


def test_models_that_the_table_does_not_cover_get_the_datasheet(measured: Tables) -> None:
    for name in ("deepseek-v3", "gpt-oss-20b"):
        shape = find_model(name)
        assert not covers(KERNELS, shape)
        times = decode_steps(shape, H200, "bf16", 1, 1e8)
        assert times.at().tier == "datasheet"


def test_an_eager_step_is_the_hosts_and_not_measured(measured: Tables) -> None:
    assert step(4, 4096, execution="eager").tier == "datasheet"


def test_a_prefill_is_made_of_attention_and_matrices(measured: Tables) -> None:
    short, long = (prefills(LLAMA, H100, "bf16", n).at() for n in (2048, 16384))
    assert short.tier == "fitted"
    assert long.value > 8 * short.value
    twice = prefills(LLAMA, H100, "bf16", 2048, 2).at()
    assert short.value < twice.value < 2.1 * short.value
    assert prefills(LLAMA, H100, "fp8", 2048).at().tier == "datasheet"


# --- transfer --------------------------------------------------------------------------------


def test_a_transfer_to_the_same_card_changes_nothing() -> None:
    moved = transferred(ROWS, H100, H100)
    assert [r.point for r in moved] == [r.point for r in ROWS]
    assert [r.median_us for r in moved] == pytest.approx([r.median_us for r in ROWS])


def test_a_transfer_scales_bytes_by_bandwidth_and_keeps_the_floor() -> None:
    for before, after in zip(ROWS, transferred(ROWS, H100, H200), strict=True):
        if before.point.op == "attention_decode":
            least = min(r.median_us for r in ROWS if r.point.op == "attention_decode")
            fixed = min(least, transfer_module.LARGEST_FLOOR_US)
            expected = fixed + (before.median_us - fixed) * 3350 / 4800
            assert after.median_us == pytest.approx(expected)
        assert after.median_us <= before.median_us * (1 + 1e-9)


def test_a_card_of_another_architecture_gets_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        transfer_module, "find_measured", lambda slug: seen.append(slug)
    )  # fmt: skip
    transfer_module._tables.cache_clear()
    assert transfer_module.tables_for(find_gpu("4090")) is None
    transfer_module._tables.cache_clear()
    assert {find_gpu(slug).architecture for slug in seen} == {"ada"}


# --- overheads -------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["h100", "4090"])
@pytest.mark.parametrize("kind", ["score_topk", "compact"])
def test_overheads_grow_with_tokens_on_measured_and_other_cards(
    measured: Tables, gpu: str, kind: Any
) -> None:
    times = policy_overhead(LLAMA, find_gpu(gpu), kind, np.array([2048, 8192, 131072]))
    assert times.tier == ("interpolated" if gpu == "h100" else "datasheet")
    assert np.all(np.diff(times.value_s) > 0)
    assert np.all((times.low_s < times.value_s) & (times.value_s < times.high_s))


def test_what_is_known_of_no_format_is_refused(measured: Tables) -> None:
    with pytest.raises(KvtuneError, match="no measured 'quantise' of 'int3'"):
        policy_overhead(LLAMA, H100, "quantise", 1024, "int3")
    with pytest.raises(KvtuneError, match=r"is no overhead\. Did you mean 'compact'"):
        policy_overhead(LLAMA, H100, "compct", 1024)  # type: ignore[arg-type]


def test_a_copy_that_is_hidden_adds_only_what_outlasts_the_work(measured: Tables) -> None:
    plain = transfer(H100, 2**28, "host_to_device")
    assert float(plain.value_s) == pytest.approx(1e-5 + 2**28 / 50e9)
    hidden = transfer(H100, 2**28, "host_to_device", hidden_behind_s=plain.value_s / 2)
    assert float(hidden.value_s) == pytest.approx(float(plain.value_s) / 2)
    gone = transfer(H100, 2**28, "host_to_device", hidden_behind_s=1.0)
    assert float(gone.value_s) == float(gone.high_s) == 0
    slow = transfer(H100, 2**28, "host_to_device", pinned=False)
    assert slow.tier == "datasheet"
    assert slow.value_s > plain.value_s


# --- files -----------------------------------------------------------------------------------

GPU_YAML = """\
gpu: h100-sxm
capture: {kvtune: '0', torch: '2', cuda: '13', driver: '5', device: D, command: c, date: 2026-11-22}
figures:
  context: {value: 500, unit: MiB, kind: measured, source: s, date: 2026-11-22}
"""


def test_a_profile_directory_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(GPU_YAML)
    with RowWriter(tmp_path / "kernels.csv") as writer:
        for one in ROWS:
            writer.write(one)
    profile = read_measured(tmp_path)
    assert profile.slug == "h100-sxm"
    assert profile.bytes_of("context") == 500 * 2**20
    assert profile.bytes_of("libraries") is None
    assert [r.point for r in profile.rows] == [r.point for r in ROWS]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("unit: MiB", "unit: GB", "is 'GB', but context is given in MiB"),
        ("value: 500", "value: -500", "must be above zero"),
        ("value: 500", "value: .nan", "must be above zero"),
        ("  context:", "  contxt:", "Did you mean 'context'"),
        ("value: 500, ", "", "lacks the key 'value'"),
        ("driver: '5', ", "", "lacks the key 'driver'"),
    ],
)
def test_a_bad_profile_is_refused_with_its_line(old: str, new: str, says: str) -> None:
    with pytest.raises(KvtuneError) as caught:
        parse_measured_gpu(GPU_YAML.replace(old, new, 1), "gpu.yaml")
    assert says in str(caught.value)
    assert (caught.value.where or "").startswith("gpu.yaml:")


def test_a_folder_that_is_no_profile_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match=r"gpu\.yaml is missing"):
        read_measured(tmp_path)


def test_steps_from_tables_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, kvtune.simulator.latency.compression; print('torch' in sys.modules)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
