"""GPU profiles: every figure has a source and one unit; names, detection, strictness."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.units import GIB
from kvtune.profiles.gpus import (
    Figure,
    GpuProfile,
    detect_gpu,
    find_gpu,
    list_gpus,
    names_of,
    parse_gpu,
    smallest_free_bytes,
)
from kvtune.tests.tiers import each

EXPECTED = {
    "rtx-3090", "rtx-4090", "rtx-5090", "a10g", "a100-40", "a100-80-sxm", "a100-80-pcie", "l4",
    "l40s", "rtx-pro-6000", "h100-sxm", "h100-pcie", "h200", "b200", "mi300x", "h20", "h800",
    "gh200-96", "b300", "gb200", "gb300", "mi250x", "mi325x", "mi355x", "t4", "v100-32", "a10",
    "rtx-a6000", "rtx-6000-ada", "rtx-3060", "rtx-3090-ti", "rtx-4060", "rtx-4080", "rtx-5070",
    "rtx-5080", "jetson-agx-orin-64", "jetson-thor", "dgx-spark", "strix-halo", "apple-m1",
    "apple-m4-max", "gaudi2", "gaudi3", "tpu-v5e", "tpu-v6e",
}  # fmt: skip
EVERY = each("gpu", list_gpus())


def figures(gpu: GpuProfile) -> dict[str, Figure]:
    return {k: v for k, v in vars(gpu).items() if isinstance(v, Figure)}


def test_the_shipped_profiles_are_those_promised() -> None:
    assert {gpu.slug for gpu in list_gpus()} >= EXPECTED


@EVERY
def test_every_figure_says_where_it_is_from(gpu: GpuProfile) -> None:
    assert len(figures(gpu)) >= 5
    for figure in figures(gpu).values():
        assert figure.source
        assert figure.value > 0


@EVERY
def test_less_memory_is_visible_than_the_box_says(gpu: GpuProfile) -> None:
    nominal = gpu.memory_nominal.value * GIB
    least = 0.6 if gpu.memory_kind == "lpddr" else 0.9  # a host keeps some of what it shares
    assert least * nominal < gpu.visible_bytes < nominal


@EVERY
def test_figures_are_of_the_right_magnitude(gpu: GpuProfile) -> None:
    ridge = gpu.bf16_flop_per_s / gpu.bandwidth_bytes_per_s
    least = 20 if gpu.vendor == "apple" else 30
    assert least < ridge < 1000  # operations a byte; a unit off by 1000 or a sparse rate shows here
    doubled = gpu.slug != "gaudi3"  # its fp8 runs at the rate of bf16
    ratio = (gpu.fp8_flop_per_s or 2 * gpu.bf16_flop_per_s) / gpu.bf16_flop_per_s
    assert (1.9 < ratio < 2.1) if doubled else ratio == 1
    assert gpu.l2 is None or 2e6 <= gpu.l2_bytes < 3e8
    # PCI Express of 8 lanes up to NVLink-C2C; within shared memory half of its bandwidth.
    assert gpu.pcie is None or 1.5e10 < gpu.pcie_bytes_per_s <= 4.5e11
    assert gpu.pcie is not None or gpu.memory_kind == "lpddr" or gpu.vendor == "google"
    assert 2e8 <= gpu.context_bytes < 1e9


@EVERY
def test_memory_that_no_driver_reported_is_an_interval(gpu: GpuProfile) -> None:
    figure = gpu.memory_visible
    if figure.interval is not None:
        assert (
            figure.interval[0] < figure.value < figure.interval[1] < gpu.memory_nominal.value * 1024
        )


@pytest.mark.parametrize(
    ("name", "bf16", "half_precision_sum"),
    [("4090", 165.2, 330.3), ("3090", 71, 142), ("5090", 209.5, 419)],
)
def test_geforce_rates_are_those_with_fp32_accumulation(
    name: str, bf16: float, half_precision_sum: float
) -> None:
    assert find_gpu(name).bf16.value == bf16
    assert find_gpu(name).bf16.value < 0.51 * half_precision_sum


def test_rates_are_dense_not_sparse() -> None:
    assert find_gpu("l40s").fp8_flop_per_s == 733e12  # 1466 is the sparse one
    assert find_gpu("h100").bf16_flop_per_s == 989e12  # 1979 is the sparse one


def test_a_4090_shows_less_than_24_gib() -> None:
    assert find_gpu("4090").visible_bytes == 25_250_627_584
    assert find_gpu("4090").memory_nominal.value == 24


@each(
    "name, slug",
    [
        ("4090", "rtx-4090"),
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("RTX_4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("h100", "h100-sxm"),
        ("H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("a100", "a100-80-sxm"),
        ("A100-40GB", "a100-40"),
        ("AMD Instinct MI300X", "mi300x"),
        ("rtx4090", "rtx-4090"),
        ("RTX 4090 24GB", "rtx-4090"),
        ("a100-80gb", "a100-80-sxm"),
        ("A 100 40 GB", "a100-40"),
        ("h100 pcie", "h100-pcie"),
        ("3080 12gb", "rtx-3080-12"),
        ("4060ti", "rtx-4060-ti"),
        ("rtx 6000 ada", "rtx-6000-ada"),
        ("7900 XTX", "rx-7900-xtx"),
        ("M3 Max", "apple-m3-max"),
        ("gb10", "dgx-spark"),
    ],
)
def test_names_are_found(name: str, slug: str) -> None:
    assert find_gpu(name).slug == slug


def test_no_two_cards_answer_to_one_name() -> None:
    names = [name for gpu in list_gpus() for name in names_of(gpu)]
    assert len(names) == len(set(names)) > 3 * len(list_gpus()) / 2


def test_another_memory_than_the_cards_is_refused() -> None:
    with pytest.raises(KvtuneError, match="the RTX 4090 has 24 GiB, not 48") as caught:
        find_gpu("RTX 4090 48GB")
    assert "--gpu-memory" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("typed", "meant"), [("mi300", "mi300x"), ("h1000", "h100"), ("rtx-5800", "rtx-5080")]
)
def test_near_misses_are_suggested(typed: str, meant: str) -> None:
    with pytest.raises(KvtuneError, match=f"Did you mean.*'{meant}'"):
        find_gpu(typed)


def test_a_card_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CARD)
    assert find_gpu(str(tmp_path / "mine.yaml")).slug == "mine"
    with pytest.raises(KvtuneError, match="there is no such card file"):
        find_gpu(str(tmp_path / "other.yaml"))


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(KvtuneError, match=r"'rtx-4900'.*Did you mean .*'rtx-4090'"):
        find_gpu("rtx-4900")


# --- detection ---------------------------------------------------------------------------------


def fake_nvml(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    class NVMLError(Exception):
        pass

    def init() -> None:
        if name is None:
            raise NVMLError("Driver Not Loaded")

    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: name,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_the_driver_name_finds_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, "NVIDIA A100-SXM4-80GB")
    found = detect_gpu()
    assert found is not None
    assert found.slug == "a100-80-sxm"


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, None)
    assert detect_gpu() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect_gpu() is None


def test_a_gpu_without_a_profile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, "NVIDIA GeForce RTX 4090 Laptop GPU")
    with pytest.raises(KvtuneError, match="RTX 4090 Laptop GPU', has no profile") as caught:
        detect_gpu()
    assert "--gpu" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("visible", "free"),
    [
        (None, 30),
        ("0", 70),
        ("0,1", 50),
        (" GPU-two ", 30),
        ("0,7,2", 70),  # there is no seventh, and CUDA shows none behind it
        ("", None),
        ("-1", None),
    ],
)
def test_the_least_free_memory_is_that_of_visible_cards(
    visible: str | None, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml(monkeypatch, "card")
    nvml: Any = sys.modules["pynvml"]
    cards = {0: 70, 1: 50, 2: 30}

    def numbered(index: int) -> int:
        if index not in cards:
            raise nvml.NVMLError("Invalid Argument")
        return index

    nvml.nvmlDeviceGetHandleByIndex = numbered
    nvml.nvmlDeviceGetHandleByUUID = lambda name: numbered({"GPU-two": 2}.get(name, -1))
    nvml.nvmlDeviceGetCount = lambda: len(cards)
    nvml.nvmlDeviceGetMemoryInfo = lambda card: types.SimpleNamespace(total=99, free=cards[card])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert smallest_free_bytes() == free


def test_without_a_driver_no_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, None)
    assert smallest_free_bytes() is None


# --- strictness --------------------------------------------------------------------------------


def record(value: object, unit: str) -> str:
    return f"{{value: {value}, unit: {unit}, kind: datasheet, date: 2024-01, source: a sheet}}"


UNITS = {
    "memory_nominal": (24, "GiB"), "memory_visible": (24000, "MiB"), "bandwidth": (1000, "GB/s"),
    "bf16": (100, "TFLOP/s"), "l2": (64, "MiB"), "pcie": (31.5, "GB/s"), "power": (300, "W"),
    "context": (400, "MiB"),
}  # fmt: skip
CARD = (
    "name: Card\nvendor: nvidia\narchitecture: ada\nmemory_kind: gddr\nfigures:\n"
    + "".join(f"  {key}: {record(*figure)}\n" for key, figure in UNITS.items())
)  # fmt: skip


def test_a_card_is_read_without_optional_figures() -> None:
    card = parse_gpu("card", CARD, "card.yaml")
    assert (card.fp8, card.int8, card.aliases) == (None, None, ())
    assert card.bandwidth_bytes_per_s == 1e12


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("value: 1000,", "value: -1000,", r"card.yaml:8: 'figures.bandwidth.value' must be above"),
        ("value: 1000,", "value: fast,", r"card.yaml:8: .*must be a number, not 'fast'"),
        ("value: 1000,", "value: .inf,", r"card.yaml:8: .*must be above zero"),
        ("value: 1000,", "value: .nan,", r"card.yaml:8: .*must be above zero"),
        ("value: 1000,", "", r"card.yaml:8: 'figures.bandwidth' lacks the key 'value'"),
        ("unit: GiB", "unit: GB", r"card.yaml:6: .*is 'GB', but memory_nominal is given in GiB"),
        ("unit: TFLOP/s", "unit: GFLOP/s", r"card.yaml:9: .*bf16 is given in TFLOP/s"),
        ("24000", "25769", r"card.yaml:7: .*more than memory_nominal; are GB and GiB mixed"),
        ("bandwidth:", "bandwith:", r"card.yaml:8: .*no known key\. Did you mean 'bandwidth'"),
        (f"  bf16: {record(*UNITS['bf16'])}\n", "", r"'figures' lacks the key 'bf16'"),
        ("kind: datasheet", "kind: rumour", r"is 'rumour'; it must be one of datasheet, measured"),
        ("date: 2024-01", "date: last year", r"must be a date like 2024-11, not 'last year'"),
        ("source: a sheet", "source: ''", r"must be a text"),
        ("memory_kind: gddr", "memory_kind: dram", r"card.yaml:4: .*one of hbm, gddr"),
        ("name: Card", "nmae: Card", r"card.yaml:1: 'nmae' is no known key\. Did you mean 'name'"),
    ],
)
def test_a_bad_card_is_refused_with_file_line_and_key(old: str, new: str, says: str) -> None:
    assert old in CARD
    with pytest.raises(KvtuneError) as caught:
        parse_gpu("card", CARD.replace(old, new), "card.yaml")
    assert caught.match(says)


def test_profiles_and_models_import_no_torch() -> None:
    code = (
        "import sys, kvtune.profiles.gpus as g, kvtune.profiles.models as m,"
        " kvtune.simulator.memory.plan, kvtune.simulator.latency.steps\n"
        "g.find_gpu('4090'); m.find_model('llama-8b')\n"
        "assert not {'torch', 'transformers', 'optuna', 'textual'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
