"""A cache of random prompts: what decode steps of the runtime are timed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvtune.policies.option import Option
from kvtune.policies.pages import exact_among
from kvtune.policies.parts import entries_of
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.choosing import Choice
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.cache.policy_cache import PolicyCache
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
    cache.reading = range(batch)
    for layer, budgets in zip(cache.layers, policy.budgets(prompt_tokens).tolist(), strict=True):
        signals = Signals(keys[:, :0], keys, values, size**-0.5, layer=layer.number)
        heads = list(zip(policy.heads[layer.number], budgets, strict=True))
        layer.hold([signals], [_choice(heads, signals)])
    return cache


def _choice(heads: Sequence[tuple[Option, int]], signals: Signals) -> Choice:
    """What a layer keeps: of each head as many tokens as it is planned to."""
    tokens, size = signals.prompt_tokens, signals.keys.shape[-1]
    entries = [entries_of(option.method.plan(budget, tokens)) for option, budget in heads]
    kept = [(option, n) for (option, _), n in zip(heads, entries, strict=True)]
    return Choice(
        kept=[_spread(tokens, n, signals.keys.device) for n in entries],
        exact=[sum(exact_among(option.keys, n)) for option, n in kept],
        newest=[
            option.keys.newest(n, "keys") for (option, _), n in zip(heads, entries, strict=True)
        ],
        merged={},
        weights={},
        beside=[[] for _ in heads],
        readers=[option.method.reader(budget) for option, budget in heads],
        held_bytes=[option.footprint(budget, tokens, size) for option, budget in heads],
        rooms=[None for _ in heads],
    )


def _spread(prompt_tokens: int, kept: int, device: torch.device) -> Tensor:
    """So many tokens at even distances."""
    return torch.linspace(0, prompt_tokens - 1, kept, device=device).long()
