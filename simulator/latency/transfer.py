"""Kernel times of a card that was not measured, from one of its architecture that was."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from kvtune.common.estimate import Tier
from kvtune.profiles.gpus import GpuProfile, list_gpus
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import find_measured
from kvtune.simulator.latency.answers import HALF_WIDTH, TIERS, FloatArray, Times
from kvtune.simulator.latency.kernels import Kernels, kernels_of

_COPIES = {"host_to_device", "device_to_host", "host_fetch"}
LARGEST_FLOOR_US = 8.0  # an op that takes longer than this at its smallest takes it for its data


class Tables(NamedTuple):
    """The kernel times that answer for a card.

    Args:
        kernels: by op.
        tier: the best that an answer from them can be: ``measured`` or ``transferred``.
        source: slug of the card that was measured.
        origin: that card's own times where ``kernels`` are made of them. What is learned from
            whole steps is learned there: most of it is launches, which no bandwidth shortens.
    """

    kernels: Kernels
    tier: Tier
    source: str
    origin: Kernels | None = None

    @property
    def whole(self) -> Kernels:
        """The times as they were measured."""
        return self.origin or self.kernels

    def times(self, seconds: FloatArray) -> Times:
        """Seconds read off between these kernels' points, with the interval of their tier."""
        tier: Tier = "interpolated" if self.tier == "measured" else self.tier
        width = HALF_WIDTH[TIERS.index(tier)] * seconds
        return Times(seconds, seconds - width, seconds + width, tier)


def tables_for(gpu: GpuProfile) -> Tables | None:
    """The card's own table, else that of a measured card of its architecture, else None."""
    return _tables(gpu)


@functools.cache
def _tables(gpu: GpuProfile) -> Tables | None:
    own = find_measured(gpu.slug)
    if own is not None:
        return Tables(kernels_of(own), "measured", gpu.slug)
    for other in _nearest_first(gpu):
        found = find_measured(other.slug)
        if found is not None:
            rows = transferred(found.rows, other, gpu)
            return Tables(Kernels(rows), "transferred", other.slug, kernels_of(found))
    return None


def _nearest_first(gpu: GpuProfile) -> list[GpuProfile]:
    """Cards of the same architecture, the most alike in bandwidth first."""
    alike = [
        other
        for other in list_gpus()
        if other.slug != gpu.slug
        and (other.vendor, other.architecture, other.memory_kind)
        == (gpu.vendor, gpu.architecture, gpu.memory_kind)
    ]
    return sorted(alike, key=lambda other: abs(_bandwidth_ratio(other, gpu) - 1))


def transferred(
    rows: Iterable[KernelRow], measured_on: GpuProfile, wanted: GpuProfile
) -> tuple[KernelRow, ...]:
    """The rows with times as the other card would have them.

    What a row takes above its op's floor scales as the roofline of its bytes and operations does;
    the floor, which is launch and latency, stays. Copies over the host link scale with the link.
    """
    known = tuple(rows)
    floors = _floors(known)
    return tuple(
        _moved(row, floors[row.point.op, row.point.kernel], measured_on, wanted) for row in known
    )


def _moved(
    row: KernelRow, floor_us: float, measured_on: GpuProfile, wanted: GpuProfile
) -> KernelRow:
    ratio = _ratio(row, measured_on, wanted)

    def scaled(time_us: float) -> float:
        fixed = min(floor_us, time_us)
        return fixed + (time_us - fixed) * ratio

    return replace(
        row,
        p10_us=scaled(row.p10_us),
        median_us=scaled(row.median_us),
        p90_us=scaled(row.p90_us),
    )


def _ratio(row: KernelRow, measured_on: GpuProfile, wanted: GpuProfile) -> float:
    if row.point.op in _COPIES:
        return measured_on.pcie_bytes_per_s / wanted.pcie_bytes_per_s
    if not row.bytes:
        return 1.0
    return _roofline(row, wanted) / _roofline(row, measured_on)


def _roofline(row: KernelRow, gpu: GpuProfile) -> float:
    return max(row.bytes / gpu.bandwidth_bytes_per_s, row.flops / gpu.bf16_flop_per_s)


def _floors(rows: tuple[KernelRow, ...]) -> dict[tuple[str, str], float]:
    """The shortest time of each kernel, within reason."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.point.op, row.point.kernel)
        found[key] = min(found.get(key, float("inf")), row.median_us)
    return {key: min(value, LARGEST_FLOOR_US) for key, value in found.items()}


def _bandwidth_ratio(first: GpuProfile, second: GpuProfile) -> float:
    return first.bandwidth_bytes_per_s / second.bandwidth_bytes_per_s
