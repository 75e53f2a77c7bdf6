"""The benchmark of whole serving runs: recipes, requests, the fit, and what is told of errors."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.benchmarks import hardware_runs as benchmark
from kvtune.benchmarks.hardware_runs import SPREAD, drawn, fit, half_width, overheads_of
from kvtune.benchmarks.serving_recipes import Row, Run, Setting, _recipe


def row(model: str, system: str, stack: str, precision: str, measured: str) -> Row:
    return {
        "model_path": model, "system": system, "backend": stack, "precision": precision,
        "tp_size": "4",
        "silicon_data_source": f"a.csv; measured={measured}T00:00:00Z; wip=False",
    }  # fmt: skip


MINIMAX, GPT_OSS = "MiniMaxAI/MiniMax-M2.5", "openai/gpt-oss-120b"


@pytest.mark.parametrize(
    ("asked", "matrices", "kv"),
    [
        ((MINIMAX, "b200_sxm", "vllm", "fp8", "2026-03-28"), "fp8_block", "bfloat16"),
        ((MINIMAX, "b200_sxm", "vllm", "fp8", "2026-04-08"), "fp8_block", "fp8"),
        ((MINIMAX, "b300_sxm", "vllm", "fp4", "2026-04-21"), "bfloat16", "fp8"),
        ((GPT_OSS, "h200_sxm", "trtllm", "fp4", "2025-12-15"), "bfloat16", "bfloat16"),
        (("some/model", "h200_sxm", "vllm", "fp8", "2026-01-01"), "", "bfloat16"),
    ],
)
def test_the_first_recipe_that_fits_a_row_is_its_own(
    asked: tuple[str, str, str, str, str], matrices: str, kv: str
) -> None:
    found = _recipe(row(*asked))
    assert (found["matrices"], found["kv"]) == (matrices, kv)
    assert found["source"]


def run(public: bool, concurrent: int = 8) -> Run:
    setting = Setting("m", "h200_sxm", "trtllm", 1, "fp8", "fp8", "bfloat16")
    return Run(setting, concurrent, 1000, 200, public, 8192, 0, 0.1, 0.01)


def test_requests_are_those_of_the_script() -> None:
    asked = drawn(run(public=True))
    assert (len(asked), asked.at_once) == (80, 8)
    assert 800 <= asked.prompt_tokens.min() <= asked.prompt_tokens.max() <= 1000
    assert 160 <= asked.output_tokens.min() <= asked.output_tokens.max() <= 200
    unknown = drawn(run(public=False))
    assert len(unknown) == 40
    assert unknown.prompt_tokens.max() <= 1100


def test_of_many_requests_fewer_are_simulated_and_the_first_count_as_in_the_whole_run() -> None:
    many = run(public=True, concurrent=150)
    assert len(drawn(many)) == 300
    waited = np.concatenate([np.full(150, 11.0), np.full(150, 1.0)])
    assert benchmark._as_of_all(waited, many) == pytest.approx(0.1 * 11 + 0.9 * 1)


def test_the_fit_finds_what_runs_were_made_of_and_stays_where_they_say_nothing() -> None:
    random = np.random.default_rng(0)
    slope = random.normal(size=(400, len(SPREAD))) / SPREAD
    slope[:, 3] = 0.0
    moved = 0.8 * SPREAD
    off = slope @ moved
    off[:40] += 3.0  # a tenth of the runs are of another world
    found = fit(slope, off)
    assert np.delete(found / moved, 3) == pytest.approx(1.0, abs=0.05)
    assert found[3] == 0.0


def test_parameters_are_never_negative() -> None:
    over, front = overheads_of(np.full(10, -1.0))
    assert set(vars(over).values()) == {0.0}
    assert (front.request_s, front.token_s, front.steps, front.peer_s) == (0.0, 0.0, 0.0, 0.0)


def test_an_interval_has_eight_of_ten_and_a_large_group_does_not_decide_alone() -> None:
    random = np.random.default_rng(1)
    off = np.exp(random.uniform(-1, 1, 5000))
    assert half_width(off, ["one"] * 5000) == pytest.approx(0.8, abs=0.02)
    both = np.concatenate([np.full(10_000, 1.01), np.full(400, 2.0)])
    groups = ["large"] * 10_000 + ["small"] * 400
    assert half_width(both, groups) == pytest.approx(np.log(1.01))
    assert half_width(both[-900:], groups[-900:]) == pytest.approx(np.log(2.0))
