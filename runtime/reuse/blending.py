"""CacheBlend and KVShare: chunks cached apart are joined, and the tokens that differ most run anew.

After Yao et al., "CacheBlend", EuroSys 2025, arXiv 2405.16444, and Yang et al., "KVShare", arXiv
2503.16525, with their released code: the first layers run for all tokens; at the check layer every
reused token is scored by how far its value is from the cached one (CacheBlend: squared; KVShare:
absolute, times the attention of the last query but one); the highest scores run through all later
layers, and see keys by true positions. Differs: one set of tokens for all later layers, without the
paper's gradual filtering; spans are given, not searched for; nothing is recomputed while decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.passes import PromptCache, placed, refuse_windows, tokens_of
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_prompt
from kvtune.traces.seam import attending, attention_of_rows

CHECK_LAYER = 1
Rule = Literal["cacheblend", "kvshare"]


@dataclass(frozen=True)
class Blended:
    """A prompt's cache made of its chunks' caches.

    Args:
        cache: of the whole prompt.
        recomputed: places of the tokens that ran through all layers, ascending ``[n]``.
    """

    cache: PromptCache
    recomputed: Tensor


class _EnoughLayersError(Exception):
    """Ends a pass whose later layers nobody needs."""


def blended(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    chunks: Sequence[PromptCache],
    *,
    share: float = 0.15,
    rule: Rule = "cacheblend",
) -> Blended:
    """Join chunks' caches and run a share of their tokens anew.

    Args:
        loaded: the model.
        token_ids: of all chunks, one behind the other.
        chunks: caches of each chunk by itself, from position 0 on. The first is an exact prefix,
            and nothing of it is run anew.
        share: of the other chunks' tokens to run anew, rounded down.
        rule: how tokens are scored.

    Raises:
        KvtuneError: tokens and chunks do not fit together, or a layer slides.
    """
    whole = sum(map(tokens_of, chunks))
    if whole != len(token_ids):
        raise KvtuneError(f"{len(token_ids)} tokens, but chunks of {whole}")
    refuse_windows(loaded, len(token_ids))
    cache = placed(loaded, chunks)
    first = tokens_of(chunks[0])
    with torch.no_grad():
        fresh, queries = _first_layers(loaded, token_ids)
        worth = _worth(rule, cache[CHECK_LAYER], fresh[-1], queries, loaded.geometry.scale)
        count = int(share * (len(token_ids) - first))
        places = (first + worth[first:].topk(count).indices).sort().values
        if count:
            cache = _run_anew(loaded, token_ids, places, fresh, cache)
        else:
            cache = [*fresh, *cache[len(fresh) :]]
    return Blended(cache, places)


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


def _run_anew(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    places: Tensor,
    fresh: PromptCache,
    cache: PromptCache,
) -> PromptCache:
    """Some tokens through all layers; each sees every token up to its own position. Writes theirs
    into the cache."""
    found, rows = PromptCache(), places.tolist()

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = (fresh if layer < len(fresh) else cache)[layer]
        if layer >= len(fresh):
            keys[:, :, places], values[:, :, places] = k, v
        found.append((keys, values))
        return attention_of_rows(q, keys, values, scale, rows)

    ids = torch.tensor(list(token_ids), device=loaded.device)[places][None]
    with attending(handler):
        loaded.model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # or gaps would be taken for packed texts
            position_ids=places[None],
            use_cache=False,
        )
    return found
