"""Attention of observed tokens to a stored prompt, with a backward pass for many probes at once.

The forward pass is the very one that all runs share. torch's backward pass of it also returns what
nobody asks for, gradients at the prompt's keys and values, and answers probes one by one; this one
computes the probabilities anew, once for all probes, and no more than is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvtune.traces.seam import causal_attention

if TYPE_CHECKING:
    from torch import Tensor


def attended(
    q: Tensor, k: Tensor, v: Tensor, prompt: tuple[Tensor, Tensor], scale: float, window: int | None
) -> Tensor:
    """Attention of C observed tokens to a whole prompt and, causally, to themselves.

    Args:
        q: queries [1, Hq, C, D].
        k: keys of the same tokens [1, H, C, D].
        v: likewise.
        prompt: keys and values [1, H, P, D], constants.
        scale: factor of the scores before the softmax.
        window: a query at position i sees keys in (i - window, i]; None means all before.

    Returns:
        Output [1, Hq, C, D]; its gradients reach q, k and v.
    """
    output: Tensor = _Attended.apply(q, k, v, *prompt, scale, window)  # type: ignore[no-untyped-call,unused-ignore]
    return output


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override,unused-ignore]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        output = causal_attention(
            q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), scale, window
        )
        ctx.save_for_backward(q, k, v, keys, values, output)
        ctx.scale, ctx.window = scale, window
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override,unused-ignore]
        q, k, v, keys, values, output = (x.float() for x in ctx.saved_tensors)
        heads, prompt = k.shape[1], keys.shape[2]
        all_keys, all_values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

        def by_kv_head(x: Tensor) -> Tensor:
            """[1, Hq, C, D] as [1, H, G * C, D]: queries that share keys go through one product."""
            return x.reshape(1, heads, -1, x.shape[-1])

        queries, slopes = by_kv_head(q), by_kv_head(slope.float())
        mass = _probabilities(queries, all_keys, ctx.scale, ctx.window, q.shape[2])
        through = slopes @ all_values.transpose(-1, -2) - (slopes * by_kv_head(output)).sum(
            -1, keepdim=True
        )
        scores = mass * through * ctx.scale
        to_queries = (scores @ all_keys).reshape(q.shape)
        to_keys = scores[..., prompt:].transpose(-1, -2) @ queries
        to_values = mass[..., prompt:].transpose(-1, -2) @ slopes
        asked = (x.to(ctx.saved_tensors[0].dtype) for x in (to_queries, to_keys, to_values))
        return (*asked, None, None, None, None)


def _probabilities(
    queries: Tensor, keys: Tensor, scale: float, window: int | None, observed: int
) -> Tensor:
    """Attention probabilities [1, H, G * C, N] of the last C of N positions."""
    count = keys.shape[2]
    at = torch.arange(count - observed, count, device=keys.device)[:, None]
    key = torch.arange(count, device=keys.device)[None, :]
    seen = key <= at
    if window is not None:
        seen &= key > at - window
    scores = (queries * scale) @ keys.transpose(-1, -2)
    hidden = ~seen.repeat(scores.shape[2] // observed, 1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)
