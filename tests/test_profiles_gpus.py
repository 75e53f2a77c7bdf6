"""GPU profiles: every figure has a source and one unit; names, detection, strictness."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.units import GIB
from kvtune.profiles.gpus import Figure, GpuProfile, detect_gpu, find_gpu, list_gpus, parse_gpu

EXPECTED = {
    "rtx-3090", "rtx-4090", "rtx-5090", "a10g", "a100-40", "a100-80-sxm", "a100-80-pcie", "l4",
    "l40s", "rtx-pro-6000", "h100-sxm", "h100-pcie", "h200", "b200", "mi300x",
}  # fmt: skip
EVERY = pytest.mark.parametrize("gpu", list_gpus(), ids=lambda gpu: gpu.slug)


def figures(gpu: GpuProfile) -> dict[str, Figure]:
    return {k: v for k, v in vars(gpu).items() if isinstance(v, Figure)}


def test_the_shipped_profiles_are_those_promised() -> None:
    assert {gpu.slug for gpu in list_gpus()} == EXPECTED


@EVERY
def test_every_figure_says_where_it_is_from(gpu: GpuProfile) -> None:
    assert len(figures(gpu)) >= 8
    for figure in figures(gpu).values():
        assert figure.source
        assert figure.value > 0


@EVERY
def test_less_memory_is_visible_than_the_box_says(gpu: GpuProfile) -> None:
    nominal = gpu.memory_nominal.value * GIB
    assert 0.9 * nominal < gpu.visible_bytes < nominal


@EVERY
def test_figures_are_of_the_right_magnitude(gpu: GpuProfile) -> None:
    ridge = gpu.bf16_flop_per_s / gpu.bandwidth_bytes_per_s
    assert 50 < ridge < 600  # operations a byte; a unit off by 1000 or a sparse rate shows here
    assert gpu.fp8_flop_per_s is None or 1.9 < gpu.fp8_flop_per_s / gpu.bf16_flop_per_s < 2.1
    assert 4e6 < gpu.l2_bytes < 3e8
    assert 3e10 < gpu.pcie_bytes_per_s < 7e10
    assert 2e8 < gpu.context_bytes < 1e9


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


@pytest.mark.parametrize(
    ("name", "slug"),
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
    ],
)
def test_names_are_found(name: str, slug: str) -> None:
    assert find_gpu(name).slug == slug


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
        (f"  l2: {record(*UNITS['l2'])}\n", "", r"'figures' lacks the key 'l2'"),
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
        " kvtune.simulator.memory, kvtune.simulator.latency\n"
        "g.find_gpu('4090'); m.find_model('llama-8b')\n"
        "assert not {'torch', 'transformers', 'optuna', 'textual'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
