"""Rows of a causal attention matrix, in full precision."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_attention(queries: Tensor, keys: Tensor, scale: float, first: int) -> Tensor:
    """Attention of W consecutive queries over all keys, ``[H, G, W, N]`` float32.

    Args:
        queries: ``[H, G, W, D]``.
        keys: ``[H, N, D]``.
        scale: multiplies the logits.
        first: position of the first query; later keys are hidden from each.
    """
    # A head's queries side by side: broadcasting would copy its keys for each of them.
    logits = queries.float().flatten(1, 2) @ keys.float().transpose(-1, -2) * scale
    logits = logits.view(*queries.shape[:3], -1)
    row = torch.arange(first, first + queries.shape[2], device=logits.device)
    column = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(column > row[:, None], -torch.inf).softmax(-1)
