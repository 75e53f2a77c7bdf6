"""What formats that no kernel reads take of a decode step: their buffers are read back each time.

Most are read where they lie (``policies.packed``), as so many bytes of pages.

Of every head of every sequence the runtime decodes keys and values with some dozens of small
launches, writes them as float32, and attends to that; no graph captures it.
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

# Of five formats on an H200 (benchmarks/results/read-back-h200.json), before a kernel read them:
# 0.58 (kivi), 0.78 (gear), 1.1 (kvquant), 1.4 (kitty) and 2.0 (qaq) ms a head of launches, and
# packed bytes at 0.001 to 0.03 of the bandwidth. Others are assumed alike.
HEAD_S = Prior(1.1e-3, 0.6e-3, 2.0e-3)
SHARE_OF_BANDWIDTH = Prior(0.005, 0.001, 0.03)


def read_back_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """Seconds of a decode step of a batch beside its kernels; 0 where kernels read all formats."""
    heads, size = _read_back(policy, shape.head_dim, prompt_tokens)
    value, low, high = (
        batch * (heads * launches + size / (share * gpu.bandwidth_bytes_per_s))
        for launches, share in (
            (HEAD_S.value, SHARE_OF_BANDWIDTH.value),
            (HEAD_S.low, SHARE_OF_BANDWIDTH.high),
            (HEAD_S.high, SHARE_OF_BANDWIDTH.low),
        )
    )
    return Estimate(value, low, high, "s", "assumed" if heads else "measured")


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


def _read_back(policy: Policy, head_dim: int, prompt_tokens: int) -> tuple[int, int]:
    """Parts of one sequence's heads that are read back, and their packed bytes."""
    if not reads_back(policy, head_dim):
        return 0, 0
    budgets = policy.budgets(prompt_tokens).ravel().tolist()
    alike = Counter(zip(policy.options(), budgets, strict=True))
    sizes = [
        (heads, heads * encoded_bytes(plan, option, head_dim))
        for (option, budget), heads in alike.items()
        for plan in option.method.plan(budget, prompt_tokens)
        if _is_read_back(plan, option, head_dim)
    ]
    return sum(heads for heads, _ in sizes), sum(size for _, size in sizes)
