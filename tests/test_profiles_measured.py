"""The measured profiles that ship: whole, plausible, and good for the steps they were made for."""

from __future__ import annotations

import csv
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import kvtune
from kvtune.policies.policy_file.reader import read_policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.measured import MeasuredProfile, find_measured
from kvtune.profiles.models import find_model
from kvtune.runtime.timing import uncompressed
from kvtune.simulator.latency.kernels import kernels_of
from kvtune.simulator.latency.parts import covers
from kvtune.simulator.latency.runtime import learned_steps
from kvtune.simulator.latency.steps import decode_step, decode_steps
from kvtune.simulator.memory.peak import overhead_bytes, process_bytes
from kvtune.simulator.memory.policy_bytes import cache_bytes_by_format

ROOT = Path(kvtune.__file__).parent
LLAMA = find_model("llama-8b")
SLUGS = sorted(
    entry.name
    for entry in (resources.files("kvtune.profiles") / "measured").iterdir()
    if entry.is_dir()
)
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("decode-h*.json"))


def profile_of(slug: str) -> MeasuredProfile:
    found = find_measured(slug)
    assert found is not None
    return found


def test_a_card_was_measured() -> None:
    assert "h100-sxm" in SLUGS


@pytest.mark.parametrize("slug", SLUGS)
def test_a_profile_is_of_the_card_it_lies_under(slug: str) -> None:
    profile = profile_of(slug)
    assert profile.slug == find_gpu(slug).slug == slug
    assert profile.capture.device in find_gpu(slug).device_names
    assert {figure.kind for figure in profile.figures.values()} == {"measured"}


@pytest.mark.parametrize("slug", SLUGS)
def test_no_cold_row_beats_the_memory_and_percentiles_are_in_order(slug: str) -> None:
    gpu = find_gpu(slug)
    for row in profile_of(slug).rows:
        assert row.p10_us <= row.median_us <= row.p90_us
        if row.point.l2 == "cold":
            assert row.bytes_per_s <= 1.02 * gpu.bandwidth_bytes_per_s


@pytest.mark.parametrize("slug", SLUGS)
def test_steps_of_the_measured_shape_are_interpolated_or_better(slug: str) -> None:
    assert covers(kernels_of(profile_of(slug)), LLAMA)
    cache = LLAMA.kv_bytes(8192)
    assert decode_steps(LLAMA, find_gpu(slug), "bf16", 8, cache).at().tier == "measured"
    between = decode_steps(LLAMA, find_gpu(slug), "bf16", 7, cache * 1.3).at()
    assert between.tier == "interpolated"
    sheet = decode_steps(LLAMA, find_gpu(slug), "bf16", 7, cache * 1.3, measured=False).at()
    assert between.high - between.low < sheet.high - sheet.low
    assert sheet.low < between.value < sheet.high


@pytest.mark.parametrize("slug", SLUGS)
def test_a_measured_card_knows_what_a_process_takes(slug: str) -> None:
    gpu = find_gpu(slug)
    taken, overhead = process_bytes(gpu), overhead_bytes(LLAMA, gpu, "bf16")
    assert taken is not None
    assert overhead.low < taken < overhead.value < overhead.high
    assert overhead.tier == "fitted"
    assert process_bytes(find_gpu("4090")) is None


WITHIN = {"h100-sxm": (0.006, 0.017), "h200": (0.015, 0.073)}
"""Mean and worst error of decode steps, as docs/hardware.md tells them."""


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_predictions_lie_as_near_to_what_was_measured_as_is_said(file: Path) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    if "points" not in document:
        predicted = file.with_name(file.name.replace("-predictions", ""))
        measured = json.loads(predicted.read_text(encoding="utf-8"))
        assert document["predicted_at"] < measured["measured_from"]
        return
    errors = [
        abs(p["predicted"]["step_s"] / p["measured"]["step_s"] - 1) for p in document["points"]
    ]
    mean, worst = WITHIN[document["gpu"]]
    assert np.mean(errors) <= mean
    assert max(errors) <= worst
    for p in document["points"]:
        assert p["predicted"]["cache_bytes"] == p["measured"]["cache_bytes"]
        off = abs(p["predicted"]["peak_bytes"] - p["measured"]["device_bytes"])
        assert off <= max(0.01 * p["measured"]["device_bytes"], 150e6)


@pytest.mark.parametrize("name", ["plan", "uncompressed"])
def test_steps_of_the_runtime_are_predicted_from_others_as_is_said(name: str) -> None:
    """Of 8 prompts of 32k tokens; those that were measured to learn from had at most 8k."""
    results = json.loads((ROOT / "benchmarks/results/decode-step-h100.json").read_text("utf-8"))
    plan = read_policy(ROOT / "benchmarks/plans/llama-8b-32k-12-percent.yaml").bind(32, 8)
    policy = plan if name == "plan" else uncompressed(plan)
    held = cache_bytes_by_format(policy, LLAMA, 32768)
    held["bf16"] += LLAMA.kv_bytes(100)
    found = decode_step(LLAMA, find_gpu("h100"), "bf16", 8, dict(held), "runtime")
    assert found.low < results[name]["ms"] / 1e3 < found.high
    assert found.value == pytest.approx(results[name]["ms"] / 1e3, rel=0.015)


@pytest.mark.parametrize("slug", SLUGS)
def test_what_is_learned_of_the_runtime_fits_its_own_steps(slug: str) -> None:
    learned = {
        each.shape.name.replace("llama-3-8b", "llama-3.1-8b"): each
        for each in learned_steps(kernels_of(profile_of(slug)))
    }
    assert learned.keys() == {"smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"}
    assert learned["llama-3.1-8b"].factor == pytest.approx(1, abs=0.01)  # the heads of the table
    for name, most in (("smollm2-135m", 0.1), ("llama-3.2-1b", 0.02), ("llama-3.1-8b", 0.006)):
        assert learned[name].misfit < most


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-8b"])
@pytest.mark.parametrize("slug", SLUGS)
def test_no_batch_stands_out_from_its_neighbours(slug: str, name: str) -> None:
    shape, batches = find_model(name), np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    for tokens in (0, 1024, 8192):
        cache = np.full(len(batches), float(shape.kv_bytes(tokens)))
        taken = decode_steps(shape, find_gpu(slug), "bf16", batches, cache, "runtime").value_s
        before, there, after = taken[:-2], taken[1:-1], taken[2:]
        assert (there <= 1.01 * np.maximum(before, after)).all()
        assert (there >= 0.98 * np.minimum(before, after)).all()


def test_published_steps_have_a_source_and_are_of_known_cards_and_models() -> None:
    path = ROOT / "benchmarks" / "data" / "published_steps.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row["source"].startswith("https://")
        assert float(row["tokens_per_s"]) > 0
        assert find_model(row["model"]).name
    assert len({find_gpu(row["gpu"]).architecture for row in rows}) >= 3
