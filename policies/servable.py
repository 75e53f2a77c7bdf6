"""What a serving engine can be given of a policy: what reads a layer's prompt once, in pages."""

from __future__ import annotations

from dataclasses import replace

from kvtune.common.errors import KvtuneError
from kvtune.policies.placement import is_coded
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs

LEFT_TO_ANSWERS = 0.1
"""Of an engine's blocks, what a new request leaves to the answers of those that run. Over Azure's
lengths in 1.25 GiB (``benchmarks/vllm_admission.py``) a twentieth leaves twice as many preemptions,
and with 0.15 fewer tokens are generated."""


def check_servable(policy: Policy, head_dim: int) -> None:
    """Refuse policies that need more than one layer's prompt at a time, or more than pages.

    Raises:
        KvtuneError: says which option it is.
    """
    hint = "search with --method streaming_llm,snapkv,h2o,full, or another of these."
    if policy.needs.rope:
        raise KvtuneError(
            f"the policy {policy.name!r} reads rotary positions, which a serving engine does not "
            "show",
            hint="leave keys at their positions (positions: kept, space: post_rope), or " + hint,
        )
    if policy.waits or replace(policy.needs, window=0, column_sums=False) != Needs():
        raise KvtuneError(
            f"the policy {policy.name!r} asks for more than reading each layer's prompt once",
            hint=hint,
        )
    for option in dict.fromkeys(policy.options()):
        plans, reader = option.method.plan(100, 1000), option.method.reader(100)
        paged = len(plans) == 1 and is_coded(plans[0], option, head_dim)
        if option.on_host or reader is not None or not paged:
            raise KvtuneError(f"{option.label!r} holds more than pages of tokens", hint=hint)
        if option.keys.newest(1, "keys"):
            raise KvtuneError(
                f"{option.label!r} leaves the newest tokens in 16 bits, which pages of an engine "
                "do not keep apart",
                hint="give it residual: 0, or take int2 or int4.",
            )
