"""A cache of random prompts: what decode steps of the runtime are timed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvtune.policies.policy import Policy
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.policy_cache import PolicyCache, load_cache
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.measure.plain_model import random_tensor


def filled(
    model: Any, policy: Policy, prompt_tokens: int, batch: int, new_tokens: int
) -> PolicyCache:
    """As many tokens as the policy keeps of each prompt, stored as a prefill would.

    Args:
        model: a transformers causal language model.
        policy: for its shape.
        prompt_tokens: P of each prompt.
        batch: sequences; all hold the same numbers.
        new_tokens: room of each.
    """
    cache = load_cache(policy, model, new_tokens=new_tokens)
    size, device = cache.geometry.head_dim, str(model.device)
    shape = (policy.kv_heads, prompt_tokens, size)
    keys, values = (random_tensor(*shape, device=device, scale=1.0) for _ in range(2))
    cache.open(model.device, [prompt_tokens] * batch)
    for layer, budgets in zip(cache.layers, policy.budgets(prompt_tokens), strict=True):
        layer.paged = PagedLayer(
            layer.number, policy.heads[layer.number], size, batch, cache.pool, cache.backend
        )
        kept = [_spread(prompt_tokens, int(n), model.device) for n in budgets]
        store_prompts(layer.paged, keys, values, kept)
        planned = zip(policy.heads[layer.number], budgets.tolist(), strict=True)
        held = [option.footprint(n, prompt_tokens, size) for option, n in planned]
        layer.paged.held_bytes = held * batch
        layer.paged.seal(new_tokens)
        layer.seen = prompt_tokens
    return cache


def _spread(prompt_tokens: int, kept: int, device: torch.device) -> Tensor:
    """So many tokens at even distances."""
    return torch.linspace(0, prompt_tokens - 1, kept, device=device).long()
