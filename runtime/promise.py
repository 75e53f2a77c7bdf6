"""Whether a plan runs within a memory limit: all that was printed, to the end, in a capped process.

The printed batch, each prompt of the printed length, generates as many tokens as were planned for.
Prompts that neighbours share are read once and stored for each, which leaves memory as full.
torch's allocator is held to the limit less what the process takes beside it, so that a plan that
needs more runs out of memory here, as it would on a smaller card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtune.common.transformers_interface import attention_restored
from kvtune.policies.policy import Policy
from kvtune.runtime.admission import read_different
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.device import Bench, unless_full
from kvtune.runtime.graph import DecodeLoop

_WARM_UP = 160, 4
"""Prompt tokens and new tokens of a run that loads and compiles what the measured one needs."""


@dataclass(frozen=True)
class Within:
    """One run under a limit.

    Args:
        batch: sequences at once.
        prompt_tokens: P of each.
        new_tokens: that each generated, or was to.
        limit_bytes: of the whole process on the device.
        finished: whether it ran to its end; if not, memory ran out.
        peak_bytes: by torch, of tensors, weights included.
        reserved_bytes: by torch, the most that its allocator has taken.
        outside_bytes: that the process takes beside the allocator, before or after the run.
        device_bytes: by NVML, the most in use on the device; None where there is none.
        page_bytes: of the cache's pages at the end; None where it did not finish.
        seconds: of reading the prompts that differ, and of all tokens; None where it did not
            finish.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    limit_bytes: int
    finished: bool
    peak_bytes: int
    reserved_bytes: int
    outside_bytes: int
    device_bytes: int | None
    page_bytes: int | None
    seconds: float | None

    @property
    def process_bytes(self) -> int:
        """What the whole process took at most."""
        return self.outside_bytes + self.reserved_bytes

    @property
    def kept(self) -> bool:
        """Whether it ran to its end within the limit."""
        return self.finished and self.process_bytes <= self.limit_bytes


def run_within(
    policy: Policy, model: Any, prompts: Tensor, new_tokens: int, limit_bytes: int, bench: Bench
) -> Within:
    """Run a plan to its end under a limit.

    Args:
        policy: for the model's shape.
        model: a transformers causal language model; as it was when this returns.
        prompts: ``[B, P]`` token ids on the model's device.
        new_tokens: of each sequence.
        limit_bytes: of the process in all, weights and context included.
        bench: of the device.

    Raises:
        KvtuneError: the paged cache cannot store the policy.
    """
    with attention_restored(model):
        _run(policy, model, prompts[:1, : _WARM_UP[0]], _WARM_UP[1], bench)
        bench.release()
        with bench.capped(limit_bytes) as outside:
            done = unless_full(lambda: _timed(policy, model, prompts, new_tokens, bench))
            bench.look()
            found = Within(
                batch=len(prompts),
                prompt_tokens=prompts.shape[1],
                new_tokens=new_tokens,
                limit_bytes=limit_bytes,
                finished=done is not None,
                peak_bytes=bench.peak_bytes(),
                reserved_bytes=bench.reserved_bytes(),
                # Kernels and libraries may have been loaded since the cap was set.
                outside_bytes=max(outside, bench.outside_bytes()),
                device_bytes=bench.device_bytes(),
                page_bytes=done and done[0],
                seconds=done and done[1],
            )
        bench.release()
    return found


def _timed(
    policy: Policy, model: Any, prompts: Tensor, new_tokens: int, bench: Bench
) -> tuple[int, float]:
    """Bytes of pages at the end, and seconds."""
    pages: list[int] = []
    taken = bench.seconds(lambda: pages.append(_run(policy, model, prompts, new_tokens, bench)))
    return pages[0], taken


@torch.no_grad()
def _run(policy: Policy, model: Any, prompts: Tensor, new_tokens: int, bench: Bench) -> int:
    """Bytes of the pages in use at the end."""
    cache = load_cache(policy, model, new_tokens=new_tokens)
    first = read_different(model, cache, prompts).argmax(-1)
    bench.look()
    places = torch.full_like(first, prompts.shape[1])
    DecodeLoop(model, cache, first, places, new_tokens).run()
    return cache.page_bytes()
