"""What formats without pages of their own take of a decode step, beside what their bytes say.

A kernel reads packed buffers where they lie (``policies.packed``), at a small share of the
bandwidth; of the few that it does not read, the runtime decodes keys and values with some dozens of
small launches, writes them as float32, and attends to that. Heads of a layer whose buffers are of
the same sizes are decoded in the launches of one, which is charged to each of them alike.
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
    """How one head's part is read: seconds of launches, and what share of the bandwidth."""

    head_s: Prior
    share: Prior


# Of five formats on an H200 (benchmarks/results/read-back-2-h200.json), before a kernel read them:
# of 8 heads decoded together 0.39 (KIVI) to 0.57 ms (GEAR) each, of 32 heads 0.22 to 0.30; of QAQ,
# whose bytes vary, 1.4 to 1.8 head by head. Packed bytes become four to sixteen float32 numbers
# each, which many passes write or read: of 32,768 tokens they add 13 (KIVI) to 17 ms for 84 MB,
# 0.1 % of the bandwidth. Others are assumed alike.
_DECODED = Prior(1.4e-3, 0.9e-3, 3e-3)
READ_BACK = Way(Prior(0.35e-3, 0.2e-3, 0.6e-3), _DECODED)
READ_BACK_VARYING = Way(Prior(1.5e-3, 1.3e-3, 1.9e-3), _DECODED)

# In place, likewise (benchmarks/results/packed-h200.json, from 256 MB to 1 GB of what bf16 takes):
# some 25 launches of a layer, over 64 heads there and fewer elsewhere; and 0.038 (kitty, gear
# without outliers) to 0.093 (int4 in groups of 32) of the bandwidth, 0.02 where tokens have
# widths, 0.01 where levels are looked up or outliers added.
_LAUNCHES = Prior(3e-6, 1e-6, 1e-5)
IN_PLACE = Way(_LAUNCHES, Prior(0.06, 0.035, 0.095))
BY_WIDTHS = Way(_LAUNCHES, Prior(0.02, 0.012, 0.03))
WITH_OUTLIERS = Way(_LAUNCHES, Prior(0.010, 0.008, 0.015))


def read_back_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """Seconds of a decode step of a batch beside its kernels; 0 where all lies in own pages."""
    parts = list(_parts(policy, shape.head_dim, prompt_tokens))
    value, low, high = (
        batch
        * sum(
            heads * getattr(way.head_s, end)
            + size / (getattr(way.share, worse) * gpu.bandwidth_bytes_per_s)
            for way, heads, size in parts
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


def _parts(policy: Policy, head_dim: int, prompt_tokens: int) -> Iterator[tuple[Way, int, int]]:
    """Of one sequence's parts without pages: how they are read, heads, packed bytes of all."""
    if not reads_back(policy, head_dim):
        return
    budgets = policy.budgets(prompt_tokens).ravel().tolist()
    alike = Counter(zip(policy.options(), budgets, strict=True))
    for (option, budget), heads in alike.items():
        for plan in option.method.plan(budget, prompt_tokens):
            if is_encoded(plan, option, head_dim):
                size = heads * encoded_bytes(plan, option, head_dim)
                yield _way(plan, option, head_dim), heads, size


def _way(plan: PartPlan, option: Option, head_dim: int) -> Way:
    formats = plan.formats or (option.keys, option.values)
    pieces = packed_pieces(formats, plan.entries, head_dim)
    if pieces is None:
        return READ_BACK_VARYING if any(form.bytes_vary for form in formats) else READ_BACK
    readings = [each.reading for piece in pieces for each in (piece.keys, piece.values)]
    if any(reading.patched or reading.levels for reading in readings):
        return WITH_OUTLIERS
    return BY_WIDTHS if any(x.widths == "tokens" for x in readings) else IN_PLACE
