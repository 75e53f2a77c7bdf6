"""What heads on the host take of a decode step: choosing, the link, and what runs meanwhile.

In every layer that has such heads the runtime chooses pages and brings them over on a side stream
while it attends to what lies on the device, then attends to what has come and joins the two. What
the link takes longer than the attention beside it is waited for. A reader that searches on the
host, as a graph of keys does, is waited for too. The three parts are those measured on the card
(ops ``host_choose``, ``host_fetch`` and ``host_join``) where they were, else priors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.estimate import Estimate
from kvtune.policies.option import Option
from kvtune.policies.parts import entries_of
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import HALF_WIDTH, TIERS, FloatArray, Times
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.priors import Prior
from kvtune.simulator.latency.transfer import tables_for

# The share of the link's rate, by its sheet, at which a kernel reads scattered blocks of pinned
# memory, and what it takes beside. On an H200 (``benchmarks/results/host-tier-2-h200.json``) 4 to
# 34 MB come at 0.54 to 0.73 of the sheet's rate, launch included, a plain copy at 0.70 to 0.83.
LINK_SHARE = Prior(0.70, 0.60, 0.80)
FETCH_FLOOR_S = Prior(15e-6, 5e-6, 30e-6)

# Kernels of a layer that choose blocks before the link is busy, some 30 small ones of a captured
# graph, and those behind it that attend to what has come and join the two. On an H200 choosing took
# 73 us a layer more than reading all (32k tokens on the device, same file), both together 60 to
# 70 us beside the blocks' own time.
CHOOSE_S = Prior(50e-6, 30e-6, 100e-6)
JOIN_S = Prior(25e-6, 15e-6, 50e-6)

# A search on the host: seconds for each key that is compared, with all of its cores at work, and
# what a layer waits for the exchange. A core compares a key of 128 channels that is not in its
# cache in about 0.1 us; 8 to 24 cores; assumed, not measured.
COMPARE_S = Prior(10e-9, 4e-9, 30e-9)
EXCHANGE_S = Prior(60e-6, 30e-6, 200e-6)

ENDS = ("value", "low", "high")
_DEVICE_SHARE = 0.7  # of the bandwidth, that attention and the reading of an index get


class HostWork(NamedTuple):
    """What a step does for one sequence in a head, in a layer, or in many layers, as arrays.

    Args:
        moved_bytes: come over from the host.
        near_bytes: read meanwhile of what lies on the device.
        compared: keys that searches on the host compare, over all query heads.
        far_bytes: read on the device for the heads on the host: indices, and what has come over.
        held_elements: keys' numbers that lie on the host.
        landed_elements: keys' numbers that come over.
    """

    moved_bytes: float | FloatArray
    near_bytes: float | FloatArray
    compared: float | FloatArray = 0
    far_bytes: float | FloatArray = 0
    held_elements: float | FloatArray = 0
    landed_elements: float | FloatArray = 0


def head_work(option: Option, budget: int, prompt_tokens: int, shape: ModelShape) -> HostWork:
    """Of one head; a layer's is the sum of its heads'."""
    size = shape.head_dim
    ledger = option.ledger(budget, prompt_tokens, size)
    if not option.on_host:
        return HostWork(0, ledger.read_bytes)
    held = entries_of(option.method.plan(budget, prompt_tokens))
    reader = option.method.reader(budget)
    return HostWork(
        moved_bytes=ledger.moved_bytes,
        near_bytes=0,
        compared=shape.query_heads
        // shape.kv_heads
        * option.compared_on_host(budget, prompt_tokens),
        far_bytes=ledger.read_bytes,
        held_elements=size * held,
        landed_elements=size * (reader.entries_read(held) if reader else held),
    )


def host_work(policy: Policy, shape: ModelShape, prompt_tokens: int) -> FloatArray:
    """Of the layers that have heads on the host, ``[layers, 6]``."""
    found = [
        [head_work(*head, prompt_tokens, shape) for head in zip(layer, budgets, strict=True)]
        for layer, budgets in zip(policy.heads, policy.budgets(prompt_tokens).tolist(), strict=True)
        if any(option.on_host for option in layer)
    ]
    each = np.array(found, np.float64).reshape(len(found), policy.kv_heads, 6)
    return np.asarray(each.sum(axis=1))


def host_step(
    policy: Policy,
    shape: ModelShape,
    gpu: GpuProfile,
    batch: int,
    prompt_tokens: int,
    kernels: Kernels | None = None,
) -> Estimate:
    """What heads on the host take of a decode step of a batch, in seconds; 0 where there are none.

    Beside the time of a step that reads what lies on the device alone.

    Args:
        policy: says which heads.
        shape: the model.
        gpu: the card.
        batch: sequences.
        prompt_tokens: of each.
        kernels: measured ones; the card's own table's unless given.
    """
    each = host_seconds(host_work(policy, shape, prompt_tokens), gpu, batch, kernels)
    value, low, high = (float(np.sum(end)) for end in (each.value_s, each.low_s, each.high_s))
    return Estimate(value, low, high, "s", each.tier)


def host_seconds(
    work: FloatArray, gpu: GpuProfile, batch: npt.ArrayLike, kernels: Kernels | None = None
) -> Times:
    """The same of each of many layers that have heads on the host.

    Args:
        work: fields of ``HostWork``, ``[..., 6]``.
        gpu: the card.
        batch: sequences, broadcast against the layers.
        kernels: as those of ``host_step``.
    """
    layers, sequences = HostWork(*np.moveaxis(work, -1, 0)), np.asarray(batch, np.float64)
    if kernels is None and (tables := tables_for(gpu)) is not None:
        kernels = tables.kernels
    if kernels is None or not kernels.has("host_fetch"):
        value, low, high = (_layer_s(layers, gpu, sequences, end) for end in ENDS)
        return Times(value, low, high, "assumed")
    width = float(HALF_WIDTH[TIERS.index("fitted")])
    value, low, high = (
        (1 + sign * width) * _measured_layer_s(layers, gpu, sequences, kernels, end)
        for end, sign in zip(ENDS, (0, -1, 1), strict=True)
    )
    return Times(value, low, high, "assumed" if np.any(layers.compared) else "fitted")


def _layer_s(layer: HostWork, gpu: GpuProfile, batch: FloatArray, end: str) -> FloatArray:
    """Layers by the priors."""
    slow = {"value": "value", "low": "high", "high": "low"}[end]  # a small share is a long time
    link = batch * layer.moved_bytes / (getattr(LINK_SHARE, slow) * gpu.pcie_bytes_per_s)
    choose = np.where(layer.compared, _search_s(layer, batch, end), getattr(CHOOSE_S, end))
    aside = choose + getattr(FETCH_FLOOR_S, end) + link
    behind = getattr(JOIN_S, end) + _read_s(layer.far_bytes, gpu, batch)
    waited = np.maximum(aside - _read_s(layer.near_bytes, gpu, batch), 0.0)
    return np.asarray(waited + behind)


def _measured_layer_s(
    layer: HostWork, gpu: GpuProfile, batch: FloatArray, kernels: Kernels, end: str
) -> FloatArray:
    """Layers by what was measured of the parts; a search on the host by its prior."""
    _, kv_heads, head_dim = kernels.heads()
    each = kv_heads * head_dim  # numbers of a token's keys in the measured layer
    chosen = kernels.by_length("host_choose", "bf16", batch * layer.held_elements / each)
    choose = np.where(layer.compared, _search_s(layer, batch, end), chosen)
    aside = choose + kernels.by_bytes("host_fetch").at(batch * layer.moved_bytes)
    behind = kernels.by_length("host_join", "bf16", batch * layer.landed_elements / each)
    waited = np.maximum(aside - _read_s(layer.near_bytes, gpu, batch), 0.0)
    return np.asarray(waited + behind)


def _search_s(layer: HostWork, batch: FloatArray, end: str) -> FloatArray:
    """A search on the host and its exchange with the device."""
    return np.asarray(batch * layer.compared * getattr(COMPARE_S, end) + getattr(EXCHANGE_S, end))


def _read_s(size: float | FloatArray, gpu: GpuProfile, batch: FloatArray) -> FloatArray:
    """Bytes of each sequence, from the device's own memory."""
    return np.asarray(batch * size / (_DEVICE_SHARE * gpu.bandwidth_bytes_per_s))
