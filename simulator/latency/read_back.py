"""What formats that no kernel reads take of a decode step: their buffers are read back each time.

The runtime decodes keys and values with some dozens of small launches, writes them as float32, and
attends to that; no graph captures it. Heads of a layer whose buffers are of the same sizes are
decoded in the launches of one, which is charged to each of them alike.
"""

from __future__ import annotations

from collections import Counter

from kvtune.common.estimate import Estimate
from kvtune.policies.encoded_pages import encoded_bytes
from kvtune.policies.pages import has_pages
from kvtune.policies.paging import is_encoded
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.priors import Prior

# An H200 (benchmarks/results/read-back-2-h200.json): of 8 heads decoded together 0.39 (KIVI) to
# 0.57 ms (GEAR) each, of 32 heads 0.22 to 0.30; of QAQ, whose bytes vary, 1.4 to 1.8 head by head.
# Packed bytes become four to sixteen float32 numbers each, which many passes write or read: of
# 32,768 tokens they add 13 (KIVI) to 17 ms for 84 MB, 0.1 % of the bandwidth.
HEAD_S = Prior(0.35e-3, 0.2e-3, 0.6e-3)
VARYING_HEAD_S = Prior(1.5e-3, 1.3e-3, 1.9e-3)
SHARE_OF_BANDWIDTH = Prior(1.4e-3, 0.9e-3, 3e-3)


def read_back_step(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, prompt_tokens: int
) -> Estimate:
    """Seconds of a decode step of a batch beside its kernels; 0 where kernels read all formats."""
    alike, varying, size = _read_back(policy, shape.head_dim, prompt_tokens)
    value, low, high = (
        batch * (alike * head + varying * other + size / (share * gpu.bandwidth_bytes_per_s))
        for head, other, share in (
            (HEAD_S.value, VARYING_HEAD_S.value, SHARE_OF_BANDWIDTH.value),
            (HEAD_S.low, VARYING_HEAD_S.low, SHARE_OF_BANDWIDTH.high),
            (HEAD_S.high, VARYING_HEAD_S.high, SHARE_OF_BANDWIDTH.low),
        )
    )
    return Estimate(value, low, high, "s", "assumed" if alike or varying else "measured")


def reads_back(policy: Policy, head_dim: int) -> bool:
    """Whether any format of a policy has no kernel."""
    return not all(has_pages(option, head_dim) for option in dict.fromkeys(policy.options()))


def _read_back(policy: Policy, head_dim: int, prompt_tokens: int) -> tuple[int, int, int]:
    """Parts of one sequence's heads that are read back, those whose bytes vary apart, and the
    packed bytes of all."""
    alike, varying, size = 0, 0, 0
    if not reads_back(policy, head_dim):
        return alike, varying, size
    budgets = policy.budgets(prompt_tokens).ravel().tolist()
    counted = Counter(zip(policy.options(), budgets, strict=True))
    for (option, budget), heads in counted.items():
        vary = option.keys.bytes_vary or option.values.bytes_vary
        for plan in option.method.plan(budget, prompt_tokens):
            if is_encoded(plan, option, head_dim):
                alike, varying = alike + heads * (not vary), varying + heads * vary
                size += heads * encoded_bytes(plan, option, head_dim)
    return alike, varying, size
