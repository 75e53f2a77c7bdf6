"""The two passes over a sample: the prompt without gradients, then the observed tokens on it.

Every run of kvtune that must agree with another (capture, replay's reference, the live cache)
takes this same split, so that full-cache logits are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvtune.traces.seam import Handler, attending, causal_attention

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

OnPrompt = Callable[[int, "Tensor", "Tensor", "Tensor"], None]
"""Called as (layer, q, k, v) when a layer's prompt attention is computed."""


def run_prompt(loaded: LoadedModel, token_ids: Sequence[int], on_layer: OnPrompt) -> None:
    """Ordinary causal pass over the prompt; no logits are computed.

    Args:
        loaded: the model.
        token_ids: the prompt [P].
        on_layer: given q [1, Hq, P, D], k and v [1, H, P, D] of each layer, in order.
    """
    import torch

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        output = causal_attention(q, k, v, scale, window)
        on_layer(layer, q, k, v)
        return output

    ids = torch.tensor([list(token_ids)], device=loaded.device)
    positions = torch.arange(ids.shape[1], device=loaded.device)[None]
    with torch.inference_mode(False), torch.no_grad(), attending(handler):
        loaded.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)


def run_observed(
    loaded: LoadedModel, token_ids: Sequence[int], start: int, handler: Handler, copies: int = 1
) -> Tensor:
    """Run tokens that begin at position ``start``; the handler adds what lies before them.

    Args:
        loaded: the model.
        token_ids: the observed tokens [C].
        start: position of the first of them.
        handler: answers every layer's attention for these C tokens.
        copies: rows of the batch that all hold these tokens.

    Returns:
        Logits [copies, C, vocabulary] in the model's dtype, with the model's own output head.
    """
    import torch

    ids = torch.tensor([list(token_ids)], device=loaded.device).expand(copies, -1)
    positions = torch.arange(start, start + ids.shape[1], device=loaded.device)[None]
    with attending(handler):
        output = loaded.model(input_ids=ids, position_ids=positions, use_cache=False)
    logits: Tensor = output.logits
    return logits


def run_whole(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    observed: int,
    handler: Handler,
) -> Tensor:
    """Run a whole sample at once; the handler answers every layer's attention for all its tokens.

    Args:
        loaded: the model.
        token_ids: prompt and observed tokens [N].
        observed: the last tokens whose logits are computed, C of them.
        handler: answers the attention.

    Returns:
        Logits [C, vocabulary] in the model's dtype.
    """
    import torch

    ids = torch.tensor([list(token_ids)], device=loaded.device)
    positions = torch.arange(ids.shape[1], device=loaded.device)[None]
    with torch.inference_mode(False), torch.no_grad(), attending(handler):
        output = loaded.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=observed
        )
    logits: Tensor = output.logits[0]
    return logits


def prompt_cache(loaded: LoadedModel, token_ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a prompt, (k, v) a layer, each [1, H, P, D]."""
    cache: list[tuple[Tensor, Tensor]] = []
    run_prompt(loaded, token_ids, lambda layer, q, k, v: cache.append((k, v)))
    return cache


def full_cache_handler(cache: Sequence[tuple[Tensor, Tensor]]) -> Handler:
    """Attention to a whole stored prompt and, causally, to the observed tokens."""
    import torch

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        before = [x.expand(q.shape[0], -1, -1, -1) for x in cache[layer]]
        keys, values = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        return causal_attention(q, keys, values, scale, window)

    return handler
