"""Attention over one part of a cache, and how the outputs of two parts become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""torch's fused attention on a CPU with its log-sum-exp, which no public function returns."""


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
        keys: ``[..., n, D]``; ``[..., 1, n, D]`` where a group of query heads shares them.
        values: likewise.
        visible: broadcasts to ``[..., Q, n]``; False is masked. None where all is visible.
        scale: multiplies the logits.
        log_weight: added to the scaled logits, broadcasts to ``[..., Q, n]``; None for none.

    Returns:
        output ``[..., Q, D]`` and log-sum-exp ``[..., Q]``; minus infinity where nothing is
        visible, with an output of zero.
    """
    if visible is None and log_weight is None and _is_fused(queries, keys, values):
        return _fused(queries, keys, values, scale)
    weights = _shared_product(queries * scale, keys.transpose(-1, -2))
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
    output = _shared_product(weights, values) / total.clamp_min(torch.finfo(weights.dtype).tiny)
    return output, (total.log() + largest)[..., 0]


def _shared_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; where a group shares the right side, its rows go through one product."""
    if not _is_shared(left, right):
        return left @ right
    rows = left.flatten(-3, -2) @ right.squeeze(-3)
    return rows.unflatten(-2, left.shape[-3:-1])  # type: ignore[no-any-return,unused-ignore]


def _is_shared(queries: Tensor, keys: Tensor) -> bool:
    return keys.dim() > 2 and queries.dim() > 2 and keys.shape[-3] == 1


def _is_fused(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch's fused attention answers: grouped heads in float32 on a CPU."""
    given = (queries, keys, values)
    return (
        _FUSED is not None
        and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in given)
        and _is_shared(queries, keys)
        and queries.dim() > 3
        and keys.shape[-1] == values.shape[-1]
        and keys.numel() > 0
    )


def _fused(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same of ``[..., H, G, C, D]`` queries and ``[..., H, 1, n, D]`` keys, in one kernel."""
    group = queries.shape[-3:-1]
    keys, values = keys.squeeze(-3), values.squeeze(-3)
    lead = torch.broadcast_shapes(queries.shape[:-3], keys.shape[:-2])
    parts = (
        part.expand(*lead, *part.shape[-2:]).reshape(-1, lead[-1], *part.shape[-2:])
        for part in (queries.flatten(-3, -2), keys, values)
    )
    output, log_sum = _FUSED(*parts, scale=scale)
    return (
        output.reshape(*lead, *group, output.shape[-1]),
        log_sum.reshape(*lead, *group),
    )


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The attention output over two parts together, from their outputs and log-sum-exps."""
    share = (first[1] - second[1]).sigmoid()[..., None]
    return first[0] * share + second[0] * (1 - share)
