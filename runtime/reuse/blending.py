"""CacheBlend and KVShare: chunks cached apart are joined, and the tokens that differ most run anew.

After Yao et al., "CacheBlend", EuroSys 2025, arXiv 2405.16444, and Yang et al., "KVShare", arXiv
2503.16525, with their released code: the first layers run for all tokens; at the check layer every
reused token is scored by how far its value is from the cached one (CacheBlend: squared; KVShare:
absolute, times the attention that the prompt's last query but one, a question's where there is one,
pays to reused keys); the highest scores run through all later layers, and see keys by true
positions. Differs: one set of tokens for all later layers, without the paper's gradual filtering;
spans are given, not searched for; nothing is recomputed while decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.passes import (
    PromptCache,
    part_of,
    placed,
    refuse_windows,
    run_anew,
    tokens_of,
    with_room,
)
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_prompt

CHECK_LAYER = 1
Rule = Literal["cacheblend", "kvshare"]


@dataclass(frozen=True)
class Blended:
    """A prompt's cache made of its chunks' caches.

    Args:
        cache: of the whole prompt, and of the question where there is one.
        recomputed: places of the chunks' tokens that ran through all layers, ascending ``[n]``.
        stale: places of the others that are worth running anew, ascending likewise.
        logits: of the question's tokens ``[C, vocabulary]``; None without one.
    """

    cache: PromptCache
    recomputed: Tensor
    stale: Tensor
    logits: Tensor | None = None


class _EnoughLayersError(Exception):
    """Ends a pass whose later layers nobody needs."""


def blended(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    chunks: Sequence[PromptCache],
    *,
    share: float = 0.15,
    rule: Rule = "cacheblend",
    question: Sequence[int] = (),
) -> Blended:
    """Join chunks' caches and run a share of their tokens anew.

    Args:
        loaded: the model.
        token_ids: of all chunks, one behind the other.
        chunks: caches of each chunk by itself, from position 0 on. The first is an exact prefix,
            and nothing of it is run anew.
        share: of the other chunks' tokens to run anew, rounded down.
        rule: how tokens are scored.
        question: tokens behind the chunks, which nobody has cached: they run in the same passes.

    Raises:
        KvtuneError: tokens and chunks do not fit together, or a layer slides.
    """
    whole, asked = sum(map(tokens_of, chunks)), len(question)
    if whole != len(token_ids):
        raise KvtuneError(f"{len(token_ids)} tokens, but chunks of {whole}")
    refuse_windows(loaded, whole + asked)
    cache = with_room(placed(loaded, chunks), asked)
    first, ids = tokens_of(chunks[0]), [*token_ids, *question]
    with torch.no_grad():
        fresh, queries = _first_layers(loaded, ids)
        cached, now = (
            part_of([each], slice(0, whole))[0] for each in (cache[CHECK_LAYER], fresh[-1])
        )
        worth = _worth(rule, cached, now, queries, loaded.geometry.scale)
    cache[: len(fresh)] = fresh
    count = int(share * (whole - first))
    chosen = (first + worth[first:].topk(count).indices).sort().values
    rest = worth.index_fill(0, chosen, 0)
    stale = first + rest[first:].nonzero()[:, 0]
    places = [*chosen.tolist(), *range(whole, whole + asked)]
    logits = None
    if places:
        mine = [ids[place] for place in places]
        logits = run_anew(loaded, mine, places, cache, len(fresh), asked)
    return Blended(cache, chosen, stale, logits)


def _first_layers(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[PromptCache, Tensor]:
    """Keys and values of all layers up to the check layer, and that layer's queries."""
    fresh, queries = PromptCache(), []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        fresh.append((k, v))
        if layer == CHECK_LAYER:
            queries.append(q)
            raise _EnoughLayersError

    try:
        run_prompt(loaded, token_ids, keep)
    except _EnoughLayersError:
        return fresh, queries[0]
    raise KvtuneError(f"a model of {len(fresh)} layers has no layer {CHECK_LAYER} to check")


def _worth(
    rule: Rule,
    cached: tuple[Tensor, Tensor],
    fresh: tuple[Tensor, Tensor],
    queries: Tensor,
    scale: float,
) -> Tensor:
    """How much each token is worth running anew, ``[T]``."""
    change = (fresh[1] - cached[1])[0].float()  # [H, T, D]
    if rule == "cacheblend":
        moved_by: Tensor = change.square().sum((0, 2))
        return moved_by
    keys = cached[0][0].float()
    asking = queries[0, :, -2].float().unflatten(0, (len(keys), -1))  # [H, G, D]
    attention = (asking @ keys.transpose(-1, -2) * scale).softmax(-1).mean((0, 1))
    worth: Tensor = change.abs().sum((0, 2)) * attention
    return worth
