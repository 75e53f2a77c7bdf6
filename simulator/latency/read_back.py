"""What formats without pages of their own take of a decode step, beside what their bytes say.

A kernel reads packed buffers where they lie (``policies.packed``), at a small share of the
bandwidth; of the few that it does not read, the runtime decodes keys and values with some dozens of
small launches, writes them as float32, and attends to that. Heads of a layer whose buffers are of
the same sizes are decoded in the launches of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from kvtune.common.estimate import Estimate
from kvtune.policies.encoded_pages import encoded_bytes, packed_pieces
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.parts import PartPlan
from kvtune.policies.placement import is_encoded
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.priors import Prior


class Way(NamedTuple):
    """How heads' parts are read: seconds of launches, and what share of the bandwidth.

    Args:
        group_s: of heads that are decoded together.
        head_s: of each of them besides.
        share: of the bandwidth, of packed bytes.
    """

    group_s: Prior
    head_s: Prior
    share: Prior


# An H200 (benchmarks/results/read-back-2-h200.json), 8 and 32 heads of 1,024 tokens, before kernels
# read these formats: 1.8 ms (KIVI) to 3.1 (GEAR) a group and 0.16 to 0.22 a head of it; QAQ, each
# head a group, 1.5 a head. Packed bytes become four to sixteen float32 numbers each, which many
# passes write or read: of 32,768 tokens they add 13 (KIVI) to 17 ms for 84 MB, 0.1 % of the
# bandwidth. Others are assumed alike.
READ_BACK = Way(
    group_s=Prior(2.5e-3, 1.2e-3, 3.5e-3),
    head_s=Prior(0.19e-3, 0.14e-3, 0.25e-3),
    share=Prior(1.4e-3, 0.9e-3, 3e-3),
)

# In place, likewise (benchmarks/results/packed-h200.json, from 256 MB to 1 GB of what bf16 takes):
# some 25 launches of a layer, over 64 heads there and fewer elsewhere; and 0.038 (kitty, gear
# without outliers) to 0.093 (int4 in groups of 32) of the bandwidth, 0.02 where tokens have
# widths, 0.01 where levels are looked up or outliers added.
_LAUNCHES = Prior(0.0, 0.0, 0.0), Prior(3e-6, 1e-6, 1e-5)
IN_PLACE = Way(*_LAUNCHES, Prior(0.06, 0.035, 0.095))
BY_WIDTHS = Way(*_LAUNCHES, Prior(0.02, 0.012, 0.03))
WITH_OUTLIERS = Way(*_LAUNCHES, Prior(0.010, 0.008, 0.015))


def read_back_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """Seconds of a decode step of a batch beside its kernels; 0 where all lies in own pages."""
    parts = list(_parts(policy, shape.head_dim, prompt_tokens))
    value, low, high = (
        batch
        * sum(
            groups * getattr(way.group_s, end)
            + heads * getattr(way.head_s, end)
            + size / (getattr(way.share, worse) * gpu.bandwidth_bytes_per_s)
            for way, groups, heads, size in parts
        )
        for end, worse in (("value", "value"), ("low", "high"), ("high", "low"))
    )
    return Estimate(value, low, high, "s", "assumed" if parts else "measured")


def reads_back(policy: Policy, head_dim: int) -> bool:
    """Whether any part of a policy's heads lies in no pages of its own."""
    return any(
        is_encoded(plan, option, head_dim)
        for option in dict.fromkeys(policy.options())
        for plan in option.method.plan(PAGE, 2 * PAGE)
    )


def _parts(
    policy: Policy, head_dim: int, prompt_tokens: int
) -> Iterator[tuple[Way, int, int, int]]:
    """Of one sequence's parts without pages, layer by layer: how they are read, groups of heads
    that are decoded together, heads, packed bytes of all; other sequences are of other lengths."""
    if not reads_back(policy, head_dim):
        return
    for options, budgets in zip(policy.heads, policy.budgets(prompt_tokens).tolist(), strict=True):
        for (option, budget), heads in Counter(zip(options, budgets, strict=True)).items():
            vary = option.keys.bytes_vary or option.values.bytes_vary
            for plan in option.method.plan(budget, prompt_tokens):
                if is_encoded(plan, option, head_dim):
                    size = heads * encoded_bytes(plan, option, head_dim)
                    yield _way(plan, option, head_dim), heads if vary else 1, heads, size


def _way(plan: PartPlan, option: Option, head_dim: int) -> Way:
    formats = plan.formats or (option.keys, option.values)
    pieces = packed_pieces(formats, plan.entries, head_dim)
    if pieces is None:
        return READ_BACK
    readings = [each.reading for piece in pieces for each in (piece.keys, piece.values)]
    if any(reading.patched or reading.levels for reading in readings):
        return WITH_OUTLIERS
    return BY_WIDTHS if any(x.widths == "tokens" for x in readings) else IN_PLACE
