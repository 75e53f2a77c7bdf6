"""A card as options describe it: by name or file, or in numbers, or some of both."""

from __future__ import annotations

import re
from dataclasses import replace

from kvtune.common.errors import KvtuneError
from kvtune.common.units import GIB, MIB, parse_bytes
from kvtune.profiles.gpus import Figure, GpuProfile
from kvtune.tuner.target import read_gpu

_SOURCE, _DATE = "given on the command line", "2026-01"
_RATES = {"GB/s": 1.0, "TB/s": 1e3, "TFLOPS": 1.0, "PFLOPS": 1e3}


def read_card(
    name: str | None, memory: str | None, bandwidth: str | None, flops: str | None
) -> GpuProfile:
    """The named card with the given figures in place of its own; all three describe one unnamed.

    Raises:
        KvtuneError: a figure lacks its unit, or there are too few to describe a card.
    """
    given = (memory, bandwidth, flops)
    if not any(given):
        return read_gpu(name)
    if name is None and not all(given):
        raise KvtuneError(
            "a card without a name needs --gpu-memory, --gpu-bandwidth and --gpu-flops",
            hint="--gpu-memory 24GiB --gpu-bandwidth 1008GB/s --gpu-flops 165TFLOPS",
        )
    card = _blank() if name is None else read_gpu(name)
    if memory is not None:
        shown = parse_bytes(memory)
        card = replace(
            card,
            memory_visible=_figure(shown / MIB, "MiB"),
            memory_nominal=_figure(max(shown / GIB, 1e-9), "GiB"),
        )
    if bandwidth is not None:
        card = replace(card, bandwidth=_figure(_rate(bandwidth, "GB/s", "TB/s"), "GB/s"))
    if flops is not None:
        card = replace(card, bf16=_figure(_rate(flops, "TFLOPS", "PFLOPS"), "TFLOP/s"))
    return replace(card, slug="described" if name is None else f"{card.slug}-changed")


def _rate(text: str, *units: str) -> float:
    """A number with one of the units, in the first."""
    parts = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z/]+)\s*", text)
    known = {unit.lower().replace("flop/s", "flops"): unit for unit in units}
    unit = known.get(parts[2].lower().replace("flop/s", "flops")) if parts else None
    try:
        value = float(parts[1]) * _RATES[unit] if parts and unit else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise KvtuneError(f"{text!r} is no rate in {' or '.join(units)}", hint=f"1008{units[0]}")
    return value


def _figure(value: float, unit: str) -> Figure:
    return Figure(value, unit, "assumed", _SOURCE, _DATE)


def _blank() -> GpuProfile:
    return GpuProfile(
        slug="described", name="card of the command line", aliases=(), device_names=(),
        vendor="unknown", architecture="unknown", memory_kind="gddr",
        memory_nominal=_figure(1, "GiB"), memory_visible=_figure(1, "MiB"),
        bandwidth=_figure(1, "GB/s"), bf16=_figure(1, "TFLOP/s"),
        context=Figure(450, "MiB", "assumed", "PyTorch process, rounded", _DATE),
        pcie=Figure(31.5, "GB/s", "assumed", "PCI Express 4.0 x16", _DATE),
    )  # fmt: skip
