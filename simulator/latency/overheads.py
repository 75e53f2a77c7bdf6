"""What a cache policy costs beside attention: scores, compaction, quantising, copies to the host.

From a card's measured kernels where there are any, else from the bytes that each must move.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError, nearest
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import HALF_WIDTH, TIERS, FloatArray, Times
from kvtune.simulator.latency.transfer import Tables, tables_for

Overhead = Literal["score_topk", "compact", "gather_pages", "quantise", "dequantise"]
Direction = Literal["host_to_device", "device_to_host"]

# Passes over a layer's cache that each op makes as plain kernels, and the share of the bandwidth
# that such kernels get: the datasheet tier. Measured on Hopper they are within a factor of two.
_PASSES: dict[str, float] = {
    "score_topk": 2.0,
    "compact": 0.5,
    "gather_pages": 2.0,
    "quantise": 6.0,
    "dequantise": 4.0,
}
_BANDWIDTH_SHARE = 0.5
_FLOOR_S = 20e-6
_LINK_SHARE = {"pinned": 0.85, "pageable": 0.25}
_FACTOR = 2.0


def policy_overhead(
    shape: ModelShape,
    gpu: GpuProfile,
    kind: Overhead,
    tokens: npt.ArrayLike,
    number_format: str = "bf16",
) -> Times:
    """Seconds that one overhead takes over all layers of one sequence.

    Args:
        shape: the model.
        gpu: the card.
        kind: what is done to each layer's cache.
        tokens: that the layer holds before it is done.
        number_format: what is quantised to or from: ``fp8``, ``int8``, ``int4``.

    Raises:
        KvtuneError: no such overhead; nothing is known of the format on a measured card.
    """
    if kind not in _PASSES:
        raise KvtuneError(f"{kind!r} is no overhead. {nearest(kind, _PASSES)}")
    held = np.asarray(tokens, dtype=np.float64)
    layer = 2.0 * shape.elements_per_token_layer * held
    tables = tables_for(gpu)
    if tables is None or not tables.kernels.has(kind):
        seconds = _FLOOR_S + _PASSES[kind] * layer / (_BANDWIDTH_SHARE * gpu.bandwidth_bytes_per_s)
        return _wide(shape.layers * seconds)
    heads = tables.kernels.heads()
    same = shape.elements_per_token_layer / (2.0 * heads[1] * heads[2])
    both = 1 if kind == "score_topk" else 2  # keys are scored; keys and values are moved
    one = tables.kernels.by_length(kind, number_format, held * same)
    return _measured(shape.layers * both * one, tables)


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
        times = _wide(seconds)
    else:
        times = _measured(known.at(size), tables)
    meanwhile = np.asarray(hidden_behind_s, dtype=np.float64)
    value, low, high = (
        np.maximum(0.0, end - meanwhile) for end in (times.value_s, times.low_s, times.high_s)
    )
    return Times(value, low, high, times.tier)


def _wide(seconds: FloatArray) -> Times:
    """The datasheet's: within a factor either way."""
    value = np.asarray(seconds)
    return Times(value, value / _FACTOR, value * _FACTOR)


def _measured(seconds: FloatArray, tables: Tables) -> Times:
    tier = "interpolated" if tables.tier == "measured" else tables.tier
    width = HALF_WIDTH[TIERS.index(tier)] * seconds
    return Times(seconds, seconds - width, seconds + width, tier)
