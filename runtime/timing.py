"""How long a policy's prefill and decode steps take on this GPU, and what memory they need.

The paged cache answers as it would in service: prompts one after another, then replays of the
decode loop's graph. The uncompressed cache runs in the same pages, in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.transformers_interface import attention_restored
from kvtune.common.units import format_tokens
from kvtune.policies.option import Option
from kvtune.policies.pages import layout_of
from kvtune.policies.paging import PREFILL_CHUNK_TOKENS
from kvtune.policies.policy import Policy
from kvtune.runtime.admission import read_different, read_prompts
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.device import Bench, unless_full
from kvtune.runtime.graph import DecodeLoop

STEPS = 16
"""Decode steps that are timed at once: a stretch long beside the resolution of a clock."""
STRETCHES = 9
PREFILLS = 3
FEW_PROMPTS = 4
"""That stand for a batch in a prefill that is timed, prompts being read in turn."""
NEW_TOKENS = STEPS * (1 + STRETCHES) + 3
"""Room of each sequence: the first token and two before capturing are not timed."""


@dataclass(frozen=True)
class Decoding:
    """One policy's decode steps.

    Args:
        batch: sequences at once.
        step: one decode step of the whole batch, seconds.
        tokens_per_second: of all sequences together, while decoding.
        peak_bytes: torch's, from prompt to last token; weights included.
        device_bytes: the most in use on the device by NVML's count; None where there is none.
        prompt_bytes: of all compressed prompts, as formats count them.
        page_bytes: of the pages in use at the end, those of generated tokens included.
    """

    batch: int
    step: Estimate
    tokens_per_second: Estimate
    peak_bytes: int
    device_bytes: int | None
    prompt_bytes: int
    page_bytes: int


@dataclass(frozen=True)
class Timing(Decoding):
    """One policy over a batch of prompts.

    Args:
        prefill: of the whole batch, compression included, seconds; counted from the first prompts.
    """

    prefill: Estimate


@dataclass(frozen=True)
class Beside:
    """A policy and the uncompressed cache over the same prompts.

    Args:
        prompt_tokens: P of each.
        plan: the policy, its batch halved until both fitted.
        full_cache: every token in bf16, in the same batch.
    """

    prompt_tokens: int
    plan: Timing
    full_cache: Timing

    @property
    def ratios(self) -> dict[str, float]:
        """Plan to uncompressed; and of the cache bytes saved, the share the peak is lower by."""
        plan, full = self.plan, self.full_cache
        saved = full.page_bytes - plan.page_bytes
        return {
            "prefill": plan.prefill.value / full.prefill.value,
            "step": plan.step.value / full.step.value,
            "tokens_per_second": plan.tokens_per_second.value / full.tokens_per_second.value,
            "page_bytes": plan.page_bytes / full.page_bytes,
            "peak_bytes": plan.peak_bytes / full.peak_bytes,
            "peak_saved": (full.peak_bytes - plan.peak_bytes) / saved if saved else 0.0,
        }


def uncompressed(policy: Policy) -> Policy:
    """Everything in bf16, for the same shape."""
    return Policy.uniform(Option(), policy.layers, policy.kv_heads, name="uncompressed")


def time_beside(policy: Policy, model: Any, prompts: Tensor, bench: Bench) -> Beside:
    """Time a policy and the uncompressed cache on the same prompts, as many as fit both.

    Args:
        policy: for the model's shape.
        model: a transformers causal language model; as it was when this returns.
        prompts: ``[B, P]`` token ids on the model's device.
        bench: of that device.

    Raises:
        KvtuneError: the paged cache cannot store the policy, or not one prompt fits.
    """
    full = uncompressed(policy)
    with attention_restored(model):
        _refuse_unstorable(policy, model)
        for batch in _halvings(len(prompts)):
            some = prompts[:batch]
            whole = unless_full(partial(time_policy, full, model, some, bench))
            plan = whole and unless_full(partial(time_policy, policy, model, some, bench))
            if whole and plan:
                return Beside(prompts.shape[1], plan, whole)
    tokens = format_tokens(prompts.shape[1])
    raise KvtuneError(f"uncompressed, not one prompt of {tokens} fits beside the weights")


def time_policy(policy: Policy, model: Any, prompts: Tensor, bench: Bench) -> Timing:
    """Time one policy; raises what ``load_cache`` does, and out of memory as torch does."""
    bench.release()
    prefills, cache, logits = _prefills(policy, model, prompts, bench)
    first, tokens = logits.argmax(-1), prompts.shape[1]
    found = time_decoding(model, cache, first, tokens, bench, STEPS, STRETCHES)
    return Timing(**vars(found), prefill=_measured(prefills))


@torch.no_grad()
def time_decoding(
    model: Any,
    cache: PolicyCache,
    first: Tensor,
    prompt_tokens: int,
    bench: Bench,
    steps: int,
    stretches: int,
) -> Decoding:
    """Time the steps that follow prompts.

    Args:
        model: answers through the cache.
        cache: holds the prompts, and has room for all the steps.
        first: ``[B]``, the first new tokens.
        prompt_tokens: P of each prompt.
        bench: of the device.
        steps: that are timed at once.
        stretches: of so many steps; one more before them is not counted.
    """
    bench.look()
    prompt_bytes, batch = cache.prompt_bytes(), len(first)
    positions = torch.full((batch,), prompt_tokens, device=first.device)
    loop = DecodeLoop(model, cache, first, positions, cache.new_tokens)
    with loop.ready():
        loop.advance(steps)
        taken = [bench.seconds(lambda: loop.advance(steps)) / steps for _ in range(stretches)]
    step = _measured(taken)
    rate, slowest, fastest = (batch / s for s in (step.value, step.high, step.low))
    return Decoding(
        batch=batch,
        step=step,
        tokens_per_second=Estimate(rate, slowest, fastest, "tokens/s", "measured"),
        peak_bytes=bench.peak_bytes(),
        device_bytes=bench.device_bytes(),
        prompt_bytes=prompt_bytes,
        page_bytes=cache.page_bytes(),
    )


@torch.no_grad()
def _prefills(
    policy: Policy, model: Any, prompts: Tensor, bench: Bench
) -> tuple[list[float], PolicyCache, Tensor]:
    """Seconds of all prefills but the first, which compiles; a cache of all prompts, its logits.

    Prefills read the first prompts, from whose seconds the batch's are counted.
    """
    few = prompts[: max(FEW_PROMPTS, PREFILL_CHUNK_TOKENS // prompts.shape[1])]
    seconds: list[float] = []
    for _ in range(PREFILLS):
        cache = load_cache(policy, model, new_tokens=NEW_TOKENS)
        read = partial(read_prompts, model, cache, few)
        bench.forget_peak()
        seconds.append(bench.seconds(read) * len(prompts) / len(few))
        del cache, read  # before the next one takes as much
    cache = load_cache(policy, model, new_tokens=NEW_TOKENS)
    bench.forget_peak()
    return seconds[1:], cache, read_different(model, cache, prompts)


def _refuse_unstorable(policy: Policy, model: Any) -> None:
    """Before anything is timed, what ``load_cache`` and the pages would say."""
    cache = load_cache(policy, model)
    for option in policy.options():
        layout_of(option, cache.geometry.head_dim)


def _halvings(count: int) -> list[int]:
    return [count >> n for n in range(count.bit_length())]


def _measured(seconds: Sequence[float]) -> Estimate:
    """The median, with the 10-90 % interval of the repeats."""
    low, value, high = (float(x) for x in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Estimate(value, low, high, "s", "measured")
