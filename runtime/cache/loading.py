"""A tuned plan in transformers: a cache that ``model.generate`` accepts, stored in pages.

::

    from kvtune.runtime import load_cache
    with load_cache("policy.yaml", model) as cache:
        model.generate(**inputs, past_key_values=cache)

The first forward pass is the prompt, in one piece; sequences of different lengths are padded on
the left. When a layer has answered it, each KV head's tokens are chosen and stored and the rest is
dropped, so that one layer at a time is uncompressed. What comes after it, generated tokens and
further turns of a conversation, is kept in 16 bits beside it; with
``evicts=True`` heads whose method can go on evicting do, so that they stay within their budgets.

What was evicted is gone: the cache cannot be cropped, and prefix reuse would give the next user a
prompt that was compressed for this one (store prompts, not caches). Give the prompt in one piece:
only its first piece would be compressed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.common.transformers_interface import cache_argument, register_attention
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.runtime.cache.answering import NAME, Answering
from kvtune.runtime.cache.attention import attention, padding_mask
from kvtune.runtime.cache.evicting import check_evicting
from kvtune.runtime.cache.placing import check_host, warn_of_slow_formats
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.cache.selecting import check_reader
from kvtune.runtime.cache.sentences import SentenceEnds, watch
from kvtune.runtime.cache.settling import check_residual
from kvtune.runtime.cache.which_backend import backend_type
from kvtune.runtime.cache.whole_prompt import calibration_for, check_passes, repeated, when_read
from kvtune.traces.geometry import Geometry, read_geometry
from kvtune.traces.learned import learned_layers
from kvtune.traces.models import fingerprint
from kvtune.traces.self_check import Ask, Part, require_same


def load_cache(
    policy: Path | str | Policy,
    model: Any,
    *,
    new_tokens: int = 1024,
    evicts: bool = False,
    residual: int | None = None,
    limit_bytes: int | None = None,
    tokenizer: Any = None,
) -> PolicyCache:
    """A cache for one conversation under a policy; the model answers through it from now on.

    As a context manager, or with ``close``, the model's former attention is put back at the end.

    Args:
        policy: a policy file, or a policy.
        model: a transformers causal language model with plain attention.
        new_tokens: to make room for at first; more is made when they are exceeded.
        evicts: whether methods that can go on evicting while tokens are generated do; if not, all
            generated tokens stay.
        residual: newest generated tokens that stay in 16 bits, where older ones take their head's
            own format, a page of 64 at a time (KIVI); None for all of them. Heads that evict from
            fewer than 16 bits keep so many, and up to twice as many, in 16 bits; without it none.
        limit_bytes: that the pool of pages never exceeds; None for no limit. Policies that hold
            more of a prompt than is in pages are refused with it.
        tokenizer: the model's, for policies that ask it to repeat its prompt (KVzip), that go by
            sentences (SentenceKV), or that must measure it first (CompressKV, on a model that was
            never measured).

    Raises:
        KvtuneError: unreadable policy, another model's shape, an unsupported format or head, or a
            model that kvtune would not answer for as it does itself. When prompts are read, or
            later: more pages than the limit allows.
    """
    geometry = read_geometry(model)
    shape = geometry.layers, geometry.kv_heads
    bound = policy if isinstance(policy, Policy) else read_policy(policy).bind(*shape)
    bound.check_fits(*shape)
    check_passes(bound, tokenizer)
    for option in dict.fromkeys(bound.options()):
        check_host(option, geometry.head_dim, evicts)
        check_reader(option, geometry.head_dim)
    if evicts:
        check_evicting(bound, geometry.head_dim)
    if residual is not None:
        check_residual(bound, residual)
    register_attention(NAME, attention, padding_mask)
    require_same(model, geometry, NAME, _through_pages(model, geometry), stored_last=True)
    cache = PolicyCache(bound, geometry, new_tokens, evicts, residual, limit_bytes=limit_bytes)
    warn_of_slow_formats(bound, geometry.head_dim, backend_type(model.device).has_kernels)
    if bound.needs.calibration:
        cache.calibration = calibration_for(model, geometry, tokenizer)
    if bound.needs.learned:
        name = fingerprint(model, geometry)
        cache.learned = learned_layers(name, geometry.layers, str(model.device))
    if bound.needs.asks_model:
        cache.repeat = partial(repeated, model, geometry, tokenizer, bound.needs)
    if bound.needs.sentences:
        cache.sentences = SentenceEnds(tokenizer)
        watch(model, cache, cache.sentences)
    if cache.waits:
        when_read(model, cache)
    cache.answering = Answering.begin(model)
    return cache


def _through_pages(model: Any, geometry: Geometry) -> Ask:
    """How the self-check asks a model: a prompt, then a token from uncompressed pages."""
    uncompressed = Policy.uniform(Option(), geometry.layers, geometry.kv_heads)
    # Plain torch on any device: no kernel is compiled for so little.
    cache = PolicyCache(uncompressed, geometry, 1, backend_of=lambda _: PlainBackend())

    def ask(ids: Tensor, part: Part) -> Tensor:
        mask = torch.ones(1, part.stop, dtype=torch.long, device=ids.device)
        logits: Tensor = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **cache_argument(model, cache)
        ).logits
        if part.stored:
            cache.layers.clear()  # they refer to it, and would keep its memory until collected
        return logits

    return ask
