"""The attention that transformers calls, and its mask: a cache's layer does what is asked.

The layer is found by the keys that it returned from ``update``, as transformers hands on nothing
else of a cache. Later tokens are checked against the prompts' mask: a layer that has dropped what
it does not keep cannot be told afterwards what was padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.cache.layer import CacheLayer
from kvtune.traces.geometry import check_shapes
from kvtune.traces.masks import MaskFunction, check_described, left_padding
from kvtune.traces.seam import refuse_unknown


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: the prompt, then one token at a time, ``[B, T, Hq, D]``."""
    refuse_unknown(extras)
    layer: CacheLayer | None = getattr(key, "paged_cache_layer", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if layer is None:
        raise KvtuneError(
            "this model answers through a compressed cache, and was given none",
            hint="give past_key_values=load_cache(policy, model) to every generate.",
        )
    with torch.no_grad():
        if not layer.seen:
            geometry = layer.cache.geometry
            check_shapes(geometry, layer.number, query, key, value, scale, sliding_window)
            padding = _padding(layer, attention_mask)
            output = layer.prompt(query, key, value, padding, scale)
        else:
            _check_later_mask(layer, attention_mask)
            output = layer.turn(query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


def _padding(layer: CacheLayer, mask: Tensor | None) -> Tensor | None:
    """The prompt's padding ``[B, P]``, as ``padding_mask`` has made it.

    Raises:
        KvtuneError: the mask was made by someone else.
    """
    if mask is None or mask.dim() == 2:
        return mask
    raise KvtuneError(
        f"an attention mask of {mask.dim()} dimensions was given",
        hint="give a mask [sequences, tokens] of ones for tokens and zeros for padding.",
    )


def _check_later_mask(layer: CacheLayer, mask: Tensor | None) -> None:
    """Once the prompts are stored: all that follows them must be real.

    Raises:
        KvtuneError: another padding than the prompts had.
    """
    mask = _padding(layer, mask)
    if mask is None or layer.number:  # all layers are given the same mask
        return
    new = layer.seen - layer.cache.width
    expected = [tokens + new for tokens in layer.cache.prompts]
    if mask.sum(1).tolist() != expected:
        raise KvtuneError(
            "the attention mask pads other tokens than the prompts' mask did",
            hint="give the prompts' mask with ones behind it; later turns cannot be padded.",
        )


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    **given: Any,
) -> Tensor | None:
    """The mask that ``attention`` gets: which tokens are real ``[B, N]``, padded on the left."""
    check_described(mask_function, given)
    return left_padding(attention_mask, batch_size, kv_length)
