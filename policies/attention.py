"""Attention over one part of a cache, and how the outputs of two parts become one."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one part of a cache, to be merged with others by its log-sum-exp.

    Args:
        queries: ``[..., Q, D]``.
        keys: ``[..., n, D]``.
        values: ``[..., n, D]``.
        visible: broadcasts to ``[..., Q, n]``; False is masked. None where all is visible.
        scale: multiplies the logits.
        log_weight: added to the scaled logits, broadcasts to ``[..., Q, n]``; None for none.

    Returns:
        output ``[..., Q, D]`` and log-sum-exp ``[..., Q]``; minus infinity where nothing is
        visible, with an output of zero.
    """
    weights = (queries * scale) @ keys.transpose(-1, -2)
    if weights.shape[-1] == 0:
        empty = weights.sum(-1)
        return empty[..., None].expand(*empty.shape, values.shape[-1]), empty - torch.inf
    if log_weight is not None:
        weights += log_weight
    if visible is not None:
        weights.masked_fill_(~visible, -torch.inf)
    largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).min)
    weights.sub_(largest).exp_()  # in place: this is most of what replay does
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp_min(torch.finfo(weights.dtype).tiny)
    return output, (total.log() + largest)[..., 0]


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The attention output over two parts together, from their outputs and log-sum-exps."""
    share = (first[1] - second[1]).sigmoid()[..., None]
    return first[0] * share + second[0] * (1 - share)
