"""How long a policy's prefill and decode steps take on this GPU, and what memory they need.

The paged cache answers as it would in service: prompts in one piece, then replays of the decode
loop's graph. The uncompressed cache runs in the same pages, in the same run.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_tokens
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.runtime.cache import PolicyCache, load_cache
from kvtune.runtime.graph import DecodeLoop
from kvtune.runtime.kernels.layout import layout_of

STEPS = 16
"""Decode steps that are timed at once: a stretch long beside the resolution of a clock."""
STRETCHES = 9
PREFILLS = 3


class Bench(Protocol):
    """A device that times calls and knows its memory."""

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes, until the device has done all of it."""

    def forget_peak(self) -> None:
        """Begin to look for the most memory anew."""

    def peak_bytes(self) -> int:
        """The most memory that tensors took since."""


class CudaBench:
    """The current CUDA device, by its own events."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Between two events around the call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def forget_peak(self) -> None:
        """After what earlier runs have left was given back; caches refer to themselves."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """As torch's allocator counts them: weights, cache and activations."""
        return int(torch.cuda.max_memory_allocated())


@dataclass(frozen=True)
class Timing:
    """One policy over a batch of prompts.

    Args:
        batch: sequences at once.
        prefill: of the whole batch, compression included, seconds.
        step: one decode step of the whole batch, seconds.
        tokens_per_second: of all sequences together, while decoding.
        peak_bytes: torch's, from prompt to last token; weights included.
        prompt_bytes: of all compressed prompts, as formats count them.
        page_bytes: of the pages in use at the end, those of generated tokens included.
    """

    batch: int
    prefill: Estimate
    step: Estimate
    tokens_per_second: Estimate
    peak_bytes: int
    prompt_bytes: int
    page_bytes: int


@dataclass(frozen=True)
class Beside:
    """A policy and the uncompressed cache over the same prompts.

    Args:
        prompt_tokens: P of each.
        plan: the policy, its batch halved until both fitted.
        full_cache: every token in bf16, in the same batch.
        alone: the policy in a larger batch, into which the uncompressed cache did not fit.
    """

    prompt_tokens: int
    plan: Timing
    full_cache: Timing
    alone: Timing | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Plan to uncompressed; and of the cache bytes saved, the share the peak is lower by.

        Tokens a second are those of the larger batches, where there was one.
        """
        plan, full = self.plan, self.full_cache
        most = self.alone or plan
        saved = full.page_bytes - plan.page_bytes
        return {
            "prefill": plan.prefill.value / full.prefill.value,
            "step": plan.step.value / full.step.value,
            "tokens_per_second": most.tokens_per_second.value / full.tokens_per_second.value,
            "page_bytes": plan.page_bytes / full.page_bytes,
            "peak_bytes": plan.peak_bytes / full.peak_bytes,
            "peak_saved": (full.peak_bytes - plan.peak_bytes) / saved if saved else 0.0,
        }


def uncompressed(policy: Policy) -> Policy:
    """Everything in bf16, for the same shape."""
    return Policy.uniform(Option(), policy.layers, policy.kv_heads, name="uncompressed")


def bench_for(device: str) -> Bench:
    """What times on this device.

    Raises:
        KvtuneError: nothing does; the message says why.
    """
    if torch.device(device).type != "cuda":
        raise KvtuneError("no GPU here, so that nothing was timed")
    if not importlib.util.find_spec("triton"):
        raise KvtuneError("the GPU's kernels need Triton, which is not installed")
    return CudaBench()


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
    attention = model.config._attn_implementation
    try:
        _refuse_unstorable(policy, model)
        for batch in _halvings(len(prompts)):
            whole = _unless_full(full, model, prompts[:batch], bench)
            plan = whole and _unless_full(policy, model, prompts[:batch], bench)
            if whole and plan:
                alone = _in_larger_batch(policy, model, prompts, batch, bench)
                return Beside(prompts.shape[1], plan, whole, alone)
    finally:
        model.set_attn_implementation(attention)
    tokens = format_tokens(prompts.shape[1])
    raise KvtuneError(f"uncompressed, not one prompt of {tokens} fits beside the weights")


def time_policy(policy: Policy, model: Any, prompts: Tensor, bench: Bench) -> Timing:
    """Time one policy; raises what ``load_cache`` does, and out of memory as torch does."""
    prefills, cache, logits = _prefills(policy, model, prompts, bench)
    prompt_bytes = cache.prompt_bytes()
    positions = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    loop = DecodeLoop(model, cache, logits.argmax(-1), positions, cache.new_tokens)
    with loop.ready():
        loop.advance(STEPS)
        stretches = [bench.seconds(lambda: loop.advance(STEPS)) for _ in range(STRETCHES)]
    step = _measured([seconds / STEPS for seconds in stretches])
    rate, slowest, fastest = (len(prompts) / s for s in (step.value, step.high, step.low))
    return Timing(
        batch=len(prompts),
        prefill=_measured(prefills),
        step=step,
        tokens_per_second=Estimate(rate, slowest, fastest, "tokens/s", "measured"),
        peak_bytes=bench.peak_bytes(),
        prompt_bytes=prompt_bytes,
        page_bytes=cache.page_bytes(),
    )


@torch.no_grad()
def _prefills(
    policy: Policy, model: Any, prompts: Tensor, bench: Bench
) -> tuple[list[float], PolicyCache, Tensor]:
    """Seconds of all prefills but the first, which compiles; the last one's cache and logits."""
    new_tokens = STEPS * (1 + STRETCHES) + 3  # the first token, and two before capturing
    places = torch.arange(prompts.shape[1], device=prompts.device).expand_as(prompts)
    seconds: list[float] = []
    answers: list[Tensor] = []
    for _ in range(PREFILLS):
        answers.clear()
        cache = load_cache(policy, model, new_tokens=new_tokens)

        def read(cache: PolicyCache = cache) -> None:
            logits = model(
                input_ids=prompts, position_ids=places, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            answers.append(logits)

        bench.forget_peak()
        seconds.append(bench.seconds(read))
    return seconds[1:], cache, answers[0]


def _refuse_unstorable(policy: Policy, model: Any) -> None:
    """Before anything is timed, what ``load_cache`` and the pages would say."""
    cache = load_cache(policy, model)
    for option in policy.options():
        layout_of(option, cache.geometry.head_dim)


def _in_larger_batch(
    policy: Policy, model: Any, prompts: Tensor, than: int, bench: Bench
) -> Timing | None:
    larger = (batch for batch in _halvings(len(prompts)) if batch > than)
    timed = (_unless_full(policy, model, prompts[:batch], bench) for batch in larger)
    return next(filter(None, timed), None)


def _unless_full(policy: Policy, model: Any, prompts: Tensor, bench: Bench) -> Timing | None:
    try:
        return time_policy(policy, model, prompts, bench)
    except torch.OutOfMemoryError:
        return None


def _halvings(count: int) -> list[int]:
    return [count >> n for n in range(count.bit_length())]


def _measured(seconds: Sequence[float]) -> Estimate:
    """The median, with the 10-90 % interval of the repeats."""
    low, value, high = (float(x) for x in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Estimate(value, low, high, "s", "measured")
