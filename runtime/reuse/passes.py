"""What all kinds of reuse share: caches, other positions for them, and passes behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import turn
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import full_cache_handler, run_observed
from kvtune.traces.seam import RowAttention, attending

PromptCache = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, ``[1, H, T, D]`` each, keys after RoPE."""


def tokens_of(cache: PromptCache) -> int:
    """How many tokens a prompt's cache holds, T."""
    return cache[0][0].shape[2]


def part_of(cache: PromptCache, part: slice) -> PromptCache:
    """The cache of some of the tokens."""
    return [(k[:, :, part], v[:, :, part]) for k, v in cache]


def joined(caches: Sequence[PromptCache]) -> PromptCache:
    """One cache of several, one behind the other."""
    layers = zip(*caches, strict=True)
    return [(torch.cat([k for k, _ in x], 2), torch.cat([v for _, v in x], 2)) for x in layers]


def moved(loaded: LoadedModel, cache: PromptCache, steps: int) -> PromptCache:
    """Keys turned to positions ``steps`` later (or earlier); values as they are.

    Exact for every fixed table of frequencies: R(steps) R(p) k = R(p + steps) k.
    """
    found = []
    for layer, (k, v) in enumerate(cache):
        rope = loaded.geometry.rope_at(layer)
        at = torch.tensor(steps, device=k.device)
        turned = k if rope is None or not steps else turn(k.float(), at, rope).to(k.dtype)
        found.append((turned, v))
    return found


def placed(loaded: LoadedModel, caches: Sequence[PromptCache]) -> PromptCache:
    """One cache of several, each from position 0 on, one behind the other: keys are turned to their
    places a layer at a time, as many caches as there may be. The tensors are nobody else's.
    """
    counts = torch.tensor([tokens_of(cache) for cache in caches])
    steps = (counts.cumsum(0) - counts).repeat_interleave(counts).to(caches[0][0][0].device)
    found = []
    for layer, (k, v) in enumerate(joined(caches)):
        rope = loaded.geometry.rope_at(layer)
        found.append((k if rope is None else turn(k.float(), steps, rope).to(k.dtype), v))
    return found


def encoded(loaded: LoadedModel, token_ids: Sequence[int], before: PromptCache) -> PromptCache:
    """Keys and values of tokens that follow a cache, each of which sees it and those before."""
    attend, found = full_cache_handler(before), PromptCache()

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        found.append((k, v))
        return attend(layer, q, k, v, scale, window)

    with torch.no_grad():
        run_observed(loaded, token_ids, tokens_of(before), handler)
    return found


def with_room(cache: PromptCache, tokens: int) -> PromptCache:
    """The cache with room for so many tokens behind it, zeros until ``run_anew`` fills them in."""
    if not tokens:
        return cache
    return [(F.pad(k, (0, 0, 0, tokens)), F.pad(v, (0, 0, 0, tokens))) for k, v in cache]


def run_anew(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    places: Sequence[int],
    cache: PromptCache,
    exact: int = 0,
    asked: int = 0,
) -> Tensor | None:
    """Run scattered tokens in one pass; each sees every token up to its own place.

    Args:
        loaded: the model.
        token_ids: theirs.
        places: theirs among the cache's tokens, ascending.
        cache: of all tokens; its keys and values of these are overwritten.
        exact: so many first layers hold these tokens' keys and values already.
        asked: tokens at the end whose logits are wanted.

    Returns:
        Logits ``[asked, vocabulary]``, or None.
    """
    attend, at = RowAttention(list(places)), torch.tensor(list(places), device=loaded.device)

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = cache[layer]
        if layer >= exact:
            keys[:, :, at], values[:, :, at] = k, v
        return attend(q, keys, values, scale)

    ids = torch.tensor([list(token_ids)], device=loaded.device)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),  # or gaps would be taken for packed texts
        "position_ids": at[None],
        "use_cache": False,
    }
    with torch.no_grad(), attending(handler):
        if not asked:
            loaded.model.base_model(**given)
            return None
        logits: Tensor = loaded.model(**given).logits[0, -asked:]
    return logits


def refuse_windows(loaded: LoadedModel, tokens: int) -> None:
    """A sliding layer's tokens change with every move.

    Raises:
        KvtuneError: a layer's window is shorter than the tokens.
    """
    short = [w for w in loaded.geometry.windows if w is not None and w < tokens]
    if short:
        raise KvtuneError(
            f"a layer attends to a sliding window of {short[0]} of {tokens} tokens",
            hint="reuse is for models whose layers all attend to the whole prompt.",
        )
