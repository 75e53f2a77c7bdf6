"""What a policy adds to decode steps beside their kernels, on the grid that an engine reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.answers import Times, least_certain
from kvtune.simulator.latency.host import host_seconds, host_work
from kvtune.simulator.latency.read_back import read_back_step, reads_back


def beside_kernels(
    steps: Times, shape: ModelShape, gpu: GpuProfile, policy: Policy, prompts: NDArray[np.float64]
) -> Times:
    """Decode steps by their kernels, ``[sequences, prompts, generated]``, with all beside those.

    Sequences are counted from one on.
    """
    sequences = np.arange(1, len(steps.value_s) + 1)[:, None, None]
    if policy.uses_host:
        steps = plus(steps, _from_host(shape, gpu, policy, sequences, prompts))
    if reads_back(policy, shape.head_dim):
        steps = plus(steps, _reading_back(shape, gpu, policy, sequences, prompts))
    return steps


def _from_host(
    shape: ModelShape, gpu: GpuProfile, policy: Policy, batch: NDArray[np.int64],
    prompts: NDArray[np.float64],
) -> Times:  # fmt: skip
    """What heads on the host take beside, ``[sequences, prompts, 1]``."""
    work = np.array([host_work(policy, shape, int(p)) for p in prompts])
    each = host_seconds(work, gpu, batch)
    value, low, high = (
        end.sum(axis=-1, keepdims=True) for end in (each.value_s, each.low_s, each.high_s)
    )
    return Times(value, low, high, each.tier)


def _reading_back(
    shape: ModelShape, gpu: GpuProfile, policy: Policy, batch: NDArray[np.int64],
    prompts: NDArray[np.float64],
) -> Times:  # fmt: skip
    """What formats without a kernel take beside, ``[sequences, prompts, 1]``."""
    each = [read_back_step(policy, shape, gpu, 1, int(p)) for p in prompts]
    value, low, high = (
        batch * np.array([getattr(x, end) for x in each])[:, None]
        for end in ("value", "low", "high")
    )
    return Times(value, low, high, "assumed")


def plus(alone: Times, added: Times) -> Times:
    """Times with what comes beside: sums over cards (0 for one card), the host, reading back."""
    value, low, high = (
        getattr(alone, end) + getattr(added, end) for end in ("value_s", "low_s", "high_s")
    )
    if not np.any(added.value_s):
        return Times(value, low, high, alone.tier, alone.tiers)
    return Times(value, low, high, least_certain(alone.tier, added.tier))
