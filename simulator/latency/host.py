"""What heads on the host add to a decode step: choosing, the link, and what runs meanwhile.

In every layer that has such heads the runtime chooses pages and brings them over on a side stream
while it attends to what lies on the device, then attends to what has come and joins the two. What
the link takes longer than the attention beside it is waited for. A reader that searches on the
host, as a graph of keys does, is waited for too.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.priors import Prior

# The share of the link's rate, by its sheet, at which a kernel reads scattered blocks of pinned
# memory, and what it takes beside. On an H200 (``benchmarks/results/host-tier-h200.json``) steps
# that bring over 134, 268 and 537 MB differ by 0.78 of the sheet's rate; blocks alone come at 0.65
# to 0.73, a plain copy of as many bytes at 0.77 to 0.83. Of one card and host.
LINK_SHARE = Prior(0.78, 0.65, 0.85)
FETCH_FLOOR_S = Prior(10e-6, 4e-6, 25e-6)

# Kernels of a layer that choose blocks, before the link is busy: some 30 small ones of a captured
# graph at about 2 us, a ranking among them; and behind it the second attention and 17 that join the
# two. Counted, not measured: of the steps on the H200 4 to 5 ms are in neither these nor the link,
# matrices in four bits of that benchmark's own kernel among them; the high ends hold all of that.
CHOOSE_S = Prior(75e-6, 40e-6, 180e-6)
JOIN_S = Prior(45e-6, 25e-6, 80e-6)

# A search on the host: seconds for each key that is compared, with all of its cores at work, and
# what a layer waits for the exchange. A core compares a key of 128 channels that is not in its
# cache in about 0.1 us; 8 to 24 cores; assumed, not measured.
COMPARE_S = Prior(10e-9, 4e-9, 30e-9)
EXCHANGE_S = Prior(60e-6, 30e-6, 200e-6)

_DEVICE_SHARE = 0.7  # of the bandwidth, that attention beside the link gets


@dataclass(frozen=True)
class HostLayer:
    """What one layer does at a step, for one sequence.

    Args:
        moved_bytes: come over from the host.
        near_bytes: read meanwhile of what lies on the device.
        compared: keys that searches on the host compare, over all query heads.
    """

    moved_bytes: int
    near_bytes: int
    compared: int


def host_layers(policy: Policy, shape: ModelShape, prompt_tokens: int) -> list[HostLayer]:
    """Of the layers that have heads on the host."""
    found, size = [], shape.head_dim
    group = shape.query_heads // shape.kv_heads
    for options, budgets in zip(policy.heads, policy.budgets(prompt_tokens), strict=True):
        heads = list(zip(options, budgets.tolist(), strict=True))
        if not any(option.on_host for option in options):
            continue
        ledgers = [option.ledger(budget, prompt_tokens, size) for option, budget in heads]
        found.append(
            HostLayer(
                sum(each.moved_bytes for each in ledgers),
                sum(
                    each.read_bytes
                    for each, option in zip(ledgers, options, strict=True)
                    if not option.on_host
                ),
                group * sum(o.compared_on_host(budget, prompt_tokens) for o, budget in heads),
            )
        )
    return found


def host_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """What heads on the host add to a decode step of a batch, in seconds; 0 where there are none.

    Beside the time of a step that reads all of ``Policy.read_bytes`` on the device.
    """
    layers = host_layers(policy, shape, prompt_tokens)
    value, low, high = (
        sum(_layer_s(each, gpu, batch, end) for each in layers) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, "s", "assumed")


def _layer_s(layer: HostLayer, gpu: GpuProfile, batch: int, end: str) -> float:
    slow = {"value": "value", "low": "high", "high": "low"}[end]  # a small share is a long time
    link = batch * layer.moved_bytes / (getattr(LINK_SHARE, slow) * gpu.pcie_bytes_per_s)
    if layer.compared:
        choose = batch * layer.compared * getattr(COMPARE_S, end) + getattr(EXCHANGE_S, end)
    else:
        choose = getattr(CHOOSE_S, end)
    near = batch * layer.near_bytes / (_DEVICE_SHARE * gpu.bandwidth_bytes_per_s)
    aside = choose + getattr(FETCH_FLOOR_S, end) + link
    return float(max(aside - near, 0.0) + getattr(JOIN_S, end))
