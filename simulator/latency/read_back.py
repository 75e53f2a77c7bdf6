"""What formats that no kernel reads take of a decode step: their buffers are read back each time.

Most are read where they lie (``policies.packed``), as so many bytes of pages.

The runtime decodes keys and values of the others with some dozens of small launches, writes them as
float32, and attends to that; no graph captures it. Heads of a layer whose buffers are of the same
sizes are decoded in the launches of one.
"""

from __future__ import annotations

from collections import Counter

from kvtune.common.estimate import Estimate
from kvtune.policies.encoded_pages import encoded_bytes, is_read_in_place
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.parts import PartPlan
from kvtune.policies.placement import is_encoded
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.priors import Prior

# An H200 (benchmarks/results/read-back-2-h200.json), 8 and 32 heads of 1,024 tokens, before kernels
# read these formats: 1.8 ms (KIVI) to 3.1 (GEAR) a group and 0.16 to 0.22 a head of it; QAQ, each
# head a group, 1.5 a head. Packed bytes become four to sixteen float32 numbers each, which many
# passes write or read: of 32,768 tokens they add 13 (KIVI) to 17 ms for 84 MB, 0.1 % of the
# bandwidth. Others are assumed alike.
GROUP_S = Prior(2.5e-3, 1.2e-3, 3.5e-3)
HEAD_S = Prior(0.19e-3, 0.14e-3, 0.25e-3)
SHARE_OF_BANDWIDTH = Prior(1.4e-3, 0.9e-3, 3e-3)


def read_back_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """Seconds of a decode step of a batch beside its kernels; 0 where kernels read all formats."""
    groups, heads, size = _read_back(policy, shape.head_dim, prompt_tokens)
    value, low, high = (
        batch * (groups * group + heads * head + size / (share * gpu.bandwidth_bytes_per_s))
        for group, head, share in (
            (GROUP_S.value, HEAD_S.value, SHARE_OF_BANDWIDTH.value),
            (GROUP_S.low, HEAD_S.low, SHARE_OF_BANDWIDTH.high),
            (GROUP_S.high, HEAD_S.high, SHARE_OF_BANDWIDTH.low),
        )
    )
    return Estimate(value, low, high, "s", "assumed" if groups else "measured")


def reads_back(policy: Policy, head_dim: int) -> bool:
    """Whether any part of a policy's heads has no kernel."""
    return any(
        _is_read_back(plan, option, head_dim)
        for option in dict.fromkeys(policy.options())
        for plan in option.method.plan(PAGE, 2 * PAGE)
    )


def _is_read_back(plan: PartPlan, option: Option, head_dim: int) -> bool:
    encoded = is_encoded(plan, option, head_dim)
    return encoded and not is_read_in_place(plan, option, head_dim)


def _read_back(policy: Policy, head_dim: int, prompt_tokens: int) -> tuple[int, int, int]:
    """One sequence's groups of parts that are decoded together, over all layers, their heads and
    packed bytes; other sequences are of other lengths."""
    groups, read, size = 0, 0, 0
    if not reads_back(policy, head_dim):
        return groups, read, size
    for options, budgets in zip(policy.heads, policy.budgets(prompt_tokens).tolist(), strict=True):
        for (option, budget), heads in Counter(zip(options, budgets, strict=True)).items():
            vary = option.keys.bytes_vary or option.values.bytes_vary
            for plan in option.method.plan(budget, prompt_tokens):
                if _is_read_back(plan, option, head_dim):
                    groups += heads if vary else 1
                    read += heads
                    size += heads * encoded_bytes(plan, option, head_dim)
    return groups, read, size
