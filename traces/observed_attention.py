"""Attention of observed tokens to a stored prompt, with a backward pass for many probes at once.

The forward pass is the very one that all runs share. torch's backward pass of it also returns what
nobody asks for, gradients at the prompt's keys and values, and answers probes one by one; this one
computes the probabilities anew, once for all probes, and no more than is asked. All probes go
through each product together, and one tensor of all keys' scores is written, in place.
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
        asked = _Gradients.apply(slope, *ctx.saved_tensors, ctx.scale, ctx.window)  # type: ignore[no-untyped-call,unused-ignore]
        return (*asked, None, None, None, None)


class _Gradients(torch.autograd.Function):
    """Gradients at q, k and v; ``vmap`` is how torch asks for those of several slopes at once."""

    @staticmethod
    def forward(  # type: ignore[override,unused-ignore]
        slope: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor,
        output: Tensor, scale: float, window: int | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        each = _gradients(slope[None], q, k, v, keys, values, output, scale, window)
        return tuple(gradient[0] for gradient in each)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: gradients of gradients are not asked for."""

    @staticmethod
    def vmap(  # type: ignore[override,unused-ignore]
        info: Any, in_dims: tuple[int | None, ...], slope: Tensor, *constant: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _gradients(slope.movedim(in_dims[0] or 0, 0), *constant), (0, 0, 0)


def _gradients(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, output: Tensor,
    scale: float, window: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients at q, k and v of S slopes ``[S, 1, Hq, C, D]``, S of each.

    Queries that share keys, and all slopes, lie side by side as rows of one product a KV head.
    """
    slopes, heads, prompt = slope.shape[0], k.shape[1], keys.shape[2]
    observed = q.shape[2]
    all_keys = torch.cat([keys, k], dim=2)[0].float()  # [H, N, D]
    all_values = torch.cat([values, v], dim=2)[0].float()
    queries = q[0].float().reshape(heads, -1, q.shape[-1])  # [H, G * C, D]
    each = slope[:, 0].float().reshape(slopes, *queries.shape).transpose(0, 1)  # [H, S, G * C, D]
    mass = _probabilities(queries, all_keys, scale, window, observed)
    level = (each * output[0].float().reshape(heads, 1, *queries.shape[1:])).sum(-1, keepdim=True)
    rows = each.flatten(1, 2), all_values.transpose(-1, -2)
    scores = torch.baddbmm(-level.flatten(1, 2), *rows).unflatten(1, (slopes, -1))
    scores.mul_(mass[:, None])  # in place: these are most of the pass's memory
    to_queries = (scores.flatten(1, 2) @ (all_keys * scale)).unflatten(1, (slopes, -1))
    to_keys = scores[..., prompt:].transpose(-1, -2) @ (queries * scale)[:, None]
    to_values = mass[:, None, :, prompt:].transpose(-1, -2) @ each
    found = ((to_queries, q), (to_keys, k), (to_values, v))
    return tuple(
        gradient.transpose(0, 1).reshape(slopes, *like.shape).to(like.dtype)
        for gradient, like in found
    )


def _probabilities(
    queries: Tensor, keys: Tensor, scale: float, window: int | None, observed: int
) -> Tensor:
    """Attention probabilities [H, G * C, N] of the last C of N positions."""
    count = keys.shape[-2]
    at = torch.arange(count - observed, count, device=keys.device)[:, None]
    first = 0 if window is not None else count - observed  # before it everybody sees every key
    key = torch.arange(first, count, device=keys.device)[None, :]
    hidden = key > at
    if window is not None:
        hidden |= key <= at - window
    scores = (queries * scale) @ keys.transpose(-1, -2)
    scores.unflatten(1, (-1, observed))[..., first:].masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1)
