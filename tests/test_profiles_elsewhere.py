"""What is read of tables in the layout of aiconfigurator-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles import elsewhere
from kvtune.profiles.elsewhere import read_table
from kvtune.profiles.models import find_model
from kvtune.profiles.split import split_over
from kvtune.profiles.stack_kernels.attention import Heads
from kvtune.profiles.stack_kernels.curve import Curve
from kvtune.profiles.stack_kernels.experts import ExpertShape
from kvtune.profiles.stack_kernels.grid import fit_grids
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.serving_kernels import ServingModel
from kvtune.simulator.latency.stack_overheads import Overheads
from kvtune.tests.made_up_tables import RATE, context_s, decode_s, matrix_s, write, write_systems


@pytest.fixture
def tables(systems: Path) -> ServingTables:
    return ServingTables(systems, "h200_sxm", "vllm")


def test_the_newest_version_is_read_by_number_not_by_letter(systems: Path) -> None:
    table = read_table(systems, "h200_sxm", "attention", "vllm", "generation_attention_perf")
    assert table is not None
    assert table.version == "0.24.0"
    assert read_table(systems, "h200_sxm", "attention", "sglang", "context_attention_perf") is None


@pytest.mark.parametrize("batch", [1, 3, 16, 50, 64])
@pytest.mark.parametrize("tokens", [1, 100, 3000, 16384, 60000])
def test_decode_attention_is_what_the_formula_says(
    tables: ServingTables, batch: int, tokens: int
) -> None:
    found = float(tables.decode_attention(Heads(32, 8, 128), None, "bfloat16", batch, tokens))
    assert found == pytest.approx(decode_s(batch, tokens, 8), rel=0.2)


def test_more_tokens_or_sequences_never_take_less(tables: ServingTables) -> None:
    grid = np.geomspace(1, 60000, 200)
    for batch in (1, 7, 64):
        seconds = tables.decode_attention(Heads(32, 8, 128), None, "bfloat16", batch, grid)
        assert np.all(np.diff(seconds) >= -1e-3 * seconds[:-1])
    seconds = tables.decode_attention(Heads(32, 8, 128), None, "bfloat16", grid[:60], 5000)
    assert np.all(np.diff(seconds) >= -1e-3 * seconds[:-1])


def test_other_heads_are_scaled_by_what_they_read(tables: ServingTables) -> None:
    found = float(tables.decode_attention(Heads(48, 16, 128), None, "bfloat16", 16, 8000))
    assert found == pytest.approx(decode_s(16, 8000, 16), rel=0.1)


def test_prompts_are_read_as_the_formula_says(tables: ServingTables) -> None:
    found = float(tables.context_attention(Heads(32, 8, 128), None, "bfloat16", 2, 3000))
    assert found == pytest.approx(context_s(2, 3000, 32), rel=0.1)


def test_a_matrix_takes_the_time_of_its_fastest_kernel(tables: ServingTables) -> None:
    for rows, out, wide in ((1, 4096, 4096), (64, 6000, 4096), (512, 16384, 1024)):
        found = float(tables.matrix(out, wide, "bfloat16", rows))
        assert found == pytest.approx(matrix_s(rows, out, wide), rel=0.15)
    with pytest.raises(KvtuneError, match="no measured matrices in fp8; it has bfloat16"):
        tables.matrix(4096, 4096, "fp8", 1)


def test_a_matrix_takes_the_time_of_the_fastest_stack_on_the_card(tmp_path: Path) -> None:
    write_systems(tmp_path)
    faster = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": 5e2 * matrix_s(m, n, k)}
        for m in (1, 64, 8192) for n in (256, 16384) for k in (256, 16384)
    ]  # fmt: skip
    write(tmp_path, "gemm", "sglang", "0.5.0", "gemm_perf", faster)
    tables = ServingTables(tmp_path, "h200_sxm", "vllm")
    assert float(tables.matrix(16384, 16384, "bfloat16", 64)) == pytest.approx(
        matrix_s(64, 16384, 16384) / 2, rel=0.01
    )
    assert float(tables.matrix(1024, 1024, "bfloat16", 8)) <= 1.01 * matrix_s(8, 1024, 1024)


def test_experts_of_another_stack_stand_in_for_a_format_that_is_missing(tmp_path: Path) -> None:
    write_systems(tmp_path)
    row = {"moe_dtype": "nvfp4", "kernel_source": "e", "num_tokens": 16, "hidden_size": 2048,
           "inter_size": 768, "topk": 8, "num_experts": 128, "moe_tp_size": 1, "moe_ep_size": 1,
           "distribution": "balanced", "latency": 0.7}  # fmt: skip
    slow = row | {"moe_dtype": "bfloat16", "latency": 1e-3}
    write(tmp_path, "moe", "trtllm", "1.0", "moe_perf", [row, slow])
    tables, shape = ServingTables(tmp_path, "h200_sxm", "vllm"), ExpertShape(2048, 768, 8, 128, 1)
    assert float(tables.experts(shape, "nvfp4", 16)) == pytest.approx(0.7e-3)
    own = float(tables.experts(shape, "bfloat16", 16))
    assert own > 1e-4  # another stack's faster kernel is not taken where there is one of its own


def test_sums_are_those_of_a_graph_and_nothing_on_one_gpu(tables: ServingTables) -> None:
    assert float(tables.all_reduce(2, 4**8)) == pytest.approx(5e-6 + 2 * 4**8 / 3e11, rel=0.05)
    assert float(tables.all_reduce(1, 4**8)) == 0.0
    assert float(tables.all_reduce(8, 4**8)) == float(tables.all_reduce(4, 4**8))


def test_experts_over_gpus_are_whole_where_shares_were_not_measured(tables: ServingTables) -> None:
    assert float(tables.experts(ExpertShape(2048, 768, 8, 128, 2), "bfloat16", 16)) == (
        pytest.approx((0.05 * 8 + 0.1) * 1e-3)
    )
    faster = tables.experts(ExpertShape(2048, 768, 8, 128, 1), "fp8", [1, 16, 256])
    assert faster == pytest.approx([1e-4, 3e-4, 1e-3])
    with pytest.raises(KvtuneError, match="no measured 128 experts of 768 x 2048"):
        tables.experts(ExpertShape(2048, 768, 4, 128, 1), "bfloat16", 16)


def model(tables: ServingTables, gpus: int = 1) -> ServingModel:
    over = Overheads(1e-6, 1e-4, 1e-6)
    shape = find_model("llama-8b")
    return ServingModel(tables, shape, gpus, "bfloat16", "bfloat16", "bfloat16", RATE, over)


def test_a_step_reads_all_weights_once(tables: ServingTables) -> None:
    shape = find_model("llama-8b")
    least = 2 * shape.active_parameters / RATE
    step = float(model(tables).decode(1, 1))
    assert least < step < 1.3 * least


def test_two_gpus_are_faster_than_one_and_slower_than_half(tables: ServingTables) -> None:
    one, two = (float(model(tables, gpus).decode(64, 8000)) for gpus in (1, 2))
    assert one / 2 < two < one


def test_configurations_are_answered_as_alone(tables: ServingTables) -> None:
    batch, tokens = np.array([1, 5, 64]), np.array([10, 900, 20000])
    together = model(tables).decode(batch, tokens)
    alone = [float(model(tables).decode(b, n)) for b, n in zip(batch, tokens, strict=True)]
    np.testing.assert_allclose(together, alone)


def test_points_left_out_are_found_again() -> None:
    random = np.random.default_rng(0)
    whole = [
        {(b, n): decode_s(b, n, kv) for b in (1, 2, 4, 8, 16, 32) for n in (1, 8, 64, 512, 4096)}
        for kv in (1, 2, 4, 8, 16)
    ]
    known = [{key: s for key, s in one.items() if random.random() > 1 / 3} for one in whole]

    def terms(batch: Any, length: Any) -> Any:
        return np.stack([np.ones_like(batch), batch * length, batch], axis=-1)

    for grid, points in zip(fit_grids(known, terms), whole, strict=True):
        assert grid is not None
        batch, length = np.array(list(points)).T
        off = np.abs(grid.at(batch, length) / np.array(list(points.values())) - 1)
        assert np.median(off) < 0.03


def test_a_geometry_of_too_few_points_has_no_grid() -> None:
    found = fit_grids([{(1, 1): 1e-5}], lambda b, n: np.stack([np.ones_like(b), b * n, b], -1))
    assert found == [None]


def test_a_curve_never_falls_and_goes_on_in_proportion() -> None:
    curve = Curve.of([1, 2, 4, 4], [1.0, 0.9, 2.0, 4.0])
    assert np.all(np.diff(curve.at(np.linspace(1, 16, 50))) >= 0)
    assert float(curve.at(8)) == pytest.approx(2 * float(curve.at(4)))


def test_without_the_wheel_the_hint_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "PACKAGE", "kvtune_no_such_package")
    with pytest.raises(KvtuneError) as caught:
        elsewhere.require_systems_folder()
    assert "kvtune[aiconfigurator]" in str(caught.value.hint)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    place = tmp_path / "data" / "h200_sxm" / "gemm" / "vllm" / "1.0"
    place.mkdir(parents=True)
    (place / "gemm_perf.parquet").write_bytes(b"no parquet")
    with pytest.raises(KvtuneError, match=r"gemm_perf\.parquet: this is no kernel table"):
        read_table(tmp_path, "h200_sxm", "gemm", "vllm", "gemm_perf")


# --- tensor parallelism ------------------------------------------------------------------------


def test_shares_add_up_to_the_model_where_heads_divide() -> None:
    shape = find_model("llama-8b")
    part = split_over(shape, 4)
    assert 4 * part.kv_bytes(1000) == shape.kv_bytes(1000)
    whole, small = shape.parameter_counts(), part.parameter_counts()
    assert 4 * (small.matrices + small.head) == whole.matrices + whole.head


def test_kv_heads_that_are_too_few_are_held_by_several() -> None:
    shape = find_model("llama-8b")
    assert split_over(shape, 16).kv_heads == 1
    assert 16 * split_over(shape, 16).kv_bytes(100) == 2 * shape.kv_bytes(100)


def test_heads_that_cannot_be_shared_are_refused_with_what_can() -> None:
    with pytest.raises(KvtuneError, match="3 GPUs cannot share evenly") as caught:
        split_over(find_model("llama-8b"), 3)
    assert caught.value.hint == "possible: 1, 2, 4, 8, 16, 32"


# --- on the command line -----------------------------------------------------------------------


def test_estimate_takes_a_stacks_kernels(
    systems: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from kvtune.__main__ import main

    monkeypatch.setattr(elsewhere, "systems_folder", lambda: systems)
    answers = {}
    for card in ("h200", "gh200-144"):
        arguments = ["estimate", "-m", "llama-8b", "--gpu", card, "--stack", "vllm", "--json"]
        assert main([*arguments, "--gpus", "2", "--context", "1k"]) == 0
        answers[card] = json.loads(capsys.readouterr().out)
    measured, moved = (answers[c]["policies"][0]["latency"] for c in ("h200", "gh200-144"))
    assert (measured["tier"], moved["tier"]) == ("measured elsewhere", "transferred")
    assert 0.95 * measured["value"] < moved["value"] < measured["value"]  # 4900 for 4800 GB/s
    assert moved["interval"][1] / moved["value"] > measured["interval"][1] / measured["value"]
