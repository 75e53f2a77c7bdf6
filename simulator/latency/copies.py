"""Copies over the host link: a card's measured ones where there are any, else its data sheet's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from kvtune.profiles.gpus import GpuProfile
from kvtune.simulator.latency.answers import Times, within
from kvtune.simulator.latency.transfer import tables_for

Direction = Literal["host_to_device", "device_to_host"]

_LINK_SHARE = {"pinned": 0.85, "pageable": 0.25}
_FACTOR = 2.0


def transfer(
    gpu: GpuProfile,
    moved_bytes: npt.ArrayLike,
    direction: Direction,
    pinned: bool = True,
    hidden_behind_s: npt.ArrayLike = 0.0,
) -> Times:
    """Seconds that a copy over the host link adds.

    Args:
        gpu: the card.
        moved_bytes: of one copy.
        direction: to or from the device.
        pinned: whether the host's memory is; pageable memory is copied twice.
        hidden_behind_s: other work that runs meanwhile; 0 for a copy that is waited for.
    """
    size = np.asarray(moved_bytes, dtype=np.float64)
    kind = "pinned" if pinned else "pageable"
    tables = tables_for(gpu)
    known = None if tables is None else tables.kernels.copy(direction, kind)
    if tables is None or known is None:
        seconds = 1e-5 + size / (_LINK_SHARE[kind] * gpu.pcie_bytes_per_s)
        times = within(seconds, _FACTOR)
    else:
        times = tables.times(known.at(size))
    meanwhile = np.asarray(hidden_behind_s, dtype=np.float64)
    value, low, high = (
        np.maximum(0.0, end - meanwhile) for end in (times.value_s, times.low_s, times.high_s)
    )
    return Times(value, low, high, times.tier)
