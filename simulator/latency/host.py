"""What heads on the host take of a decode step: choosing, the link, and what runs meanwhile.

In every layer that has such heads the runtime chooses pages and brings them over on a side stream
while it attends to what lies on the device, then attends to what has come and joins the two. What
the link takes longer than the attention beside it is waited for. A reader that searches on the
host, as a graph of keys does, is waited for too. The three parts are those measured on the card
(ops ``host_choose``, ``host_fetch`` and ``host_join``) where they were, else priors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.common.estimate import Estimate, Tier
from kvtune.policies.parts import entries_of
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import HALF_WIDTH, TIERS
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

_DEVICE_SHARE = 0.7  # of the bandwidth, that attention and the reading of an index get


@dataclass(frozen=True)
class HostLayer:
    """What one layer does at a step, for one sequence.

    Args:
        moved_bytes: come over from the host.
        near_bytes: read meanwhile of what lies on the device.
        compared: keys that searches on the host compare, over all query heads.
        far_bytes: read on the device for the heads on the host: indices, and what has come over.
        held_elements: keys' numbers that lie on the host.
        landed_elements: keys' numbers that come over.
    """

    moved_bytes: int
    near_bytes: int
    compared: int
    far_bytes: int = 0
    held_elements: int = 0
    landed_elements: int = 0


def host_layers(policy: Policy, shape: ModelShape, prompt_tokens: int) -> list[HostLayer]:
    """Of the layers that have heads on the host."""
    found, size = [], shape.head_dim
    group = shape.query_heads // shape.kv_heads
    for options, budgets in zip(policy.heads, policy.budgets(prompt_tokens), strict=True):
        heads = list(zip(options, budgets.tolist(), strict=True))
        far = [(option, budget) for option, budget in heads if option.on_host]
        if not far:
            continue
        ledgers = [option.ledger(budget, prompt_tokens, size) for option, budget in far]
        near = sum(
            option.ledger(budget, prompt_tokens, size).read_bytes
            for option, budget in heads
            if not option.on_host
        )
        held = [entries_of(o.method.plan(n, prompt_tokens)) for o, n in far]
        readers = [option.method.reader(budget) for option, budget in far]
        landed = [
            reader.entries_read(count) if reader else count
            for reader, count in zip(readers, held, strict=True)
        ]
        found.append(
            HostLayer(
                moved_bytes=sum(each.moved_bytes for each in ledgers),
                near_bytes=near,
                compared=group * sum(o.compared_on_host(n, prompt_tokens) for o, n in far),
                far_bytes=sum(each.read_bytes for each in ledgers),
                held_elements=size * sum(held),
                landed_elements=size * sum(landed),
            )
        )
    return found


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
    layers = host_layers(policy, shape, prompt_tokens)
    if kernels is None and (tables := tables_for(gpu)) is not None:
        kernels = tables.kernels
    if kernels is not None and kernels.has("host_fetch"):
        return _measured(layers, gpu, batch, kernels)
    value, low, high = (
        sum(_layer_s(each, gpu, batch, end) for each in layers) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, "s", "assumed")


def _layer_s(layer: HostLayer, gpu: GpuProfile, batch: int, end: str) -> float:
    """One layer by the priors."""
    slow = {"value": "value", "low": "high", "high": "low"}[end]  # a small share is a long time
    link = batch * layer.moved_bytes / (getattr(LINK_SHARE, slow) * gpu.pcie_bytes_per_s)
    choose = getattr(CHOOSE_S, end)
    if layer.compared:
        choose = _search_s(layer, batch, end)
    aside = choose + getattr(FETCH_FLOOR_S, end) + link
    behind = getattr(JOIN_S, end) + _read_s(layer.far_bytes, gpu, batch)
    return float(max(aside - _read_s(layer.near_bytes, gpu, batch), 0.0) + behind)


def _measured(
    layers: Sequence[HostLayer], gpu: GpuProfile, batch: int, kernels: Kernels
) -> Estimate:
    """All layers by what was measured of the parts; a search on the host by its prior."""
    width = float(HALF_WIDTH[TIERS.index("fitted")])
    ends: list[float] = []
    for end, sign in (("value", 0), ("low", -1), ("high", 1)):
        searched = [_search_s(layer, batch, end) if layer.compared else None for layer in layers]
        pairs = zip(layers, searched, strict=True)
        known = sum(_measured_layer_s(layer, gpu, batch, kernels, found) for layer, found in pairs)
        ends.append((1 + sign * width) * known)
    tier: Tier = "assumed" if any(layer.compared for layer in layers) else "fitted"
    value, low, high = ends
    return Estimate(value, low, high, "s", tier)


def _measured_layer_s(
    layer: HostLayer, gpu: GpuProfile, batch: int, kernels: Kernels, searched: float | None
) -> float:
    """One layer by what was measured; ``searched`` in place of choosing, unless it is None."""
    _, kv_heads, head_dim = kernels.heads()
    each = kv_heads * head_dim  # numbers of a token's keys in the measured layer
    choose = searched
    if choose is None:
        held = batch * layer.held_elements / each
        choose = float(kernels.by_length("host_choose", "bf16", held))
    aside = choose + float(kernels.by_bytes("host_fetch").at(batch * layer.moved_bytes))
    landed = batch * layer.landed_elements / each
    behind = float(kernels.by_length("host_join", "bf16", landed))
    return max(aside - _read_s(layer.near_bytes, gpu, batch), 0.0) + behind


def _search_s(layer: HostLayer, batch: int, end: str) -> float:
    """A search on the host and its exchange with the device."""
    return float(batch * layer.compared * getattr(COMPARE_S, end) + getattr(EXCHANGE_S, end))


def _read_s(size: int, gpu: GpuProfile, batch: int) -> float:
    """Bytes of each sequence, from the device's own memory."""
    return batch * size / (_DEVICE_SHARE * gpu.bandwidth_bytes_per_s)
