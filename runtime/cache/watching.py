"""Attention weights of a decode step at single tokens, for methods that evict by them.

Kernels leave logits segment by segment, beside each row's log-sum-exp; places of a segment become
columns of them once for a layer's tables, not at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.runtime.cache.backend import AttentionSeen
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.kernels.launch import Scratch


def attend_seeing(
    layer: PagedLayer, q: Tensor, scratch: Scratch, scale: float
) -> tuple[Tensor, AttentionSeen]:
    """``PagedLayer.attend``'s output ``[rows, G, D]``, and the logits that ``weights_at`` reads."""
    rows, group, _ = q.shape
    logits = q.new_empty(group, _width(layer), dtype=torch.float32)
    seen = AttentionSeen(q.new_empty(rows, group, dtype=torch.float32), logits)
    output = layer.backend.attend(q, layer.paged, scratch, scale, seen)
    return layer.with_beside(q, output, seen.lse, scale), seen


def columns_of(layer: PagedLayer, kind: int, rows: Tensor, places: int) -> Tensor:
    """Columns of ``AttentionSeen.logits`` that hold the first places of rows' segments of a kind:
    ``[*rows, places]`` int64 of int64 rows. They hold until the layer is sealed again."""
    place = torch.arange(places, device=rows.device)
    columns = layer.columns[kind * layer.rows + rows][..., None] + place
    return columns.clamp_max(_width(layer) - 1)


def weights_at(columns: Tensor, rows: Tensor, real: Tensor, seen: AttentionSeen) -> Tensor:
    """Attention at columns of rows, ``[*rows, G, places]`` float32.

    Args:
        columns: of ``columns_of``, ``[*rows, places]``.
        rows: int64.
        real: places that hold a token, likewise; elsewhere weights are zero.
        seen: of ``attend_seeing``.

    Raises:
        RuntimeError: attention was asked for no logits.
    """
    if seen.logits is None:
        raise RuntimeError("nobody asked for logits")
    logits = seen.logits[:, columns].movedim(0, -2)
    return (logits - seen.lse[rows][..., None]).exp().where(real[..., None, :], 0)


def _width(layer: PagedLayer) -> int:
    """Columns of logits: few widths, since kernels are compiled for one."""
    return 1 << int(layer.places[-1]).bit_length()
