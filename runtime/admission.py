"""Reading prompts as in service: sequence after sequence into pages, each in chunks of tokens.

A layer reads a prompt's keys and values whole, since methods choose among all of them, and drops
what is not kept before the next layer is read. What works on each token alone, a layer's
feed-forward part, is given a chunk of tokens at a time: it is what would take the most room.
Prompts that are shorter than a chunk are read together. So the peak is that of one prompt, whatever
the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kvtune.common.transformers_interface import cache_argument
from kvtune.policies.paging import PREFILL_CHUNK_TOKENS
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.fuse import fused_on_gpu

_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe")
"""What families of models call the part of a layer that works on each token alone."""


@torch.no_grad()
def read_prompts(
    model: Any,
    cache: PolicyCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Tensor:
    """Read a batch of prompts into a cache; the logits after each, ``[B, V]``.

    Args:
        model: that the cache was loaded for.
        cache: new.
        input_ids: prompts ``[B, P]``, padded on the left.
        attention_mask: ``[B, P]`` of ones for tokens, where there is padding.
        chunk_tokens: that feed-forward parts are given at once, and prompts that are read together
            have at most.
    """
    width = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    lengths: list[int] = mask.sum(1).tolist()
    cache.open(input_ids.device, lengths, width)
    logits = []
    with fused_on_gpu(model), in_chunks(model, chunk_tokens):
        for sequences in together(lengths, chunk_tokens):
            tokens = lengths[sequences.start]
            ids = input_ids[sequences.start : sequences.stop, width - tokens :]
            logits.append(read_some(model, cache, ids, sequences))
    return torch.cat(logits)


@torch.no_grad()
def read_for_all(
    model: Any,
    cache: PolicyCache,
    prompt: Tensor,
    batch: int,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Tensor:
    """Store one prompt ``[1, P]`` for every sequence, in one pass over it; the logits after it."""
    cache.open(prompt.device, batch * [prompt.shape[1]])
    with fused_on_gpu(model), in_chunks(model, chunk_tokens):
        return read_some(model, cache, prompt, range(batch))


@torch.no_grad()
def read_different(
    model: Any,
    cache: PolicyCache,
    input_ids: Tensor,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Tensor:
    """Store unpadded prompts, of which neighbours may be the same; the logits after each.

    The cache then holds what ``read_prompts`` would have left; but a prompt that several neighbours
    share is read once. Only the last ones, as many as are read together, are read as in service:
    while they are, memory is as full as it is there at its fullest.
    """
    batch, tokens = input_ids.shape
    cache.open(input_ids.device, batch * [tokens])
    last = max(0, batch - max(1, chunk_tokens // tokens))
    logits = []
    with fused_on_gpu(model), in_chunks(model, chunk_tokens):
        for sequences in alike(input_ids[:last]):
            one = read_some(
                model, cache, input_ids[sequences.start : sequences.start + 1], sequences
            )
            logits.append(one.expand(len(sequences), -1))
        logits.append(read_some(model, cache, input_ids[last:], range(last, batch)))
    return torch.cat(logits)


def alike(input_ids: Tensor) -> Iterator[range]:
    """Neighbours in ``[B, P]`` that are the same."""
    first = 0
    if not len(input_ids):
        return
    for count in torch.unique_consecutive(input_ids, dim=0, return_counts=True)[1].tolist():
        yield range(first, first + count)
        first += count


def read_some(model: Any, cache: PolicyCache, ids: Tensor, sequences: range) -> Tensor:
    """Read equally long prompts ``[n, P]`` of an open cache's sequences, ``[n, V]``."""
    cache.reading = sequences
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    logits: Tensor = model(
        input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1,
        **cache_argument(model, cache),
    ).logits[:, -1]  # fmt: skip
    return logits.clone()  # a view of the last of them may keep all


def together(lengths: Sequence[int], chunk_tokens: int) -> Iterator[range]:
    """Neighbours of one length, as many as make a chunk; one at least."""
    first = 0
    for tokens, run in groupby(lengths):
        stop = first + len(list(run))
        most = max(1, chunk_tokens // tokens)
        for start in range(first, stop, most):
            yield range(start, min(start + most, stop))
        first = stop


@contextmanager
def in_chunks(model: Any, tokens: int) -> Iterator[None]:
    """Let feed-forward parts work on so many tokens at once, until the block ends."""
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _FEED_FORWARD:
                before = module.__dict__.get("forward")
                module.forward = partial(_chunked, module.forward, tokens)
                undo.callback(_restore, module, before)
        yield


def _restore(module: Any, before: Callable[..., Any] | None) -> None:
    if before is None:
        del module.__dict__["forward"]
    else:
        module.forward = before


def _chunked(forward: Callable[..., Any], most: int, hidden: Tensor, **given: Any) -> Any:
    """Run ``forward`` on pieces of ``[B, T, hidden]``, or whole where it is short or not one."""
    step = max(1, most // len(hidden))
    if hidden.dim() != 3 or hidden.shape[1] <= step or given:
        return forward(hidden, **given)
    first = forward(hidden[:, :step])
    if not isinstance(first, Tensor):
        return forward(hidden)
    found = first.new_empty(*hidden.shape[:2], first.shape[-1])
    found[:, :step] = first
    del first
    for start in range(step, hidden.shape[1], step):
        found[:, start : start + step] = forward(hidden[:, start : start + step])
    return found
