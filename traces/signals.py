"""Attention statistics that policies ask for, computed in tiles and never as an N x N tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError, nearest

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_OF = {
    "column_sums": ("column_sums",),
    "query_moments": ("query_mean", "query_covariance"),
    "later_queries": ("later_queries",),
    "reconstruction": ("reconstruction",),
    "repeat_queries": ("repeat_queries",),
    "study_queries": ("study_queries",),
    "calibration": ("head_scores", "layer_error"),
    "sentences": ("sentence_ends",),
}
"""What capture can record beside q, k, v, output and probes, and the tensors that hold it."""

SIGNALS = tuple(TENSORS_OF)

_TILE_BYTES = 2**26
_TILE_QUERIES = 128  # the fewer, the fewer scores of later keys are computed for nothing


def check_signals(signals: tuple[str, ...]) -> None:
    """Refuse names of signals that capture does not know."""
    for name in signals:
        if name not in SIGNALS:
            raise KvtuneError(f"{name!r} is no signal", hint=nearest(name, SIGNALS))


def tensors_of(signals: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors that hold these signals in a trace."""
    return tuple(name for signal in signals for name in TENSORS_OF[signal])


def column_sums(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention that every key receives, summed over all queries: H2O's score.

    Tiles of queries see all their keys, so each tile's softmax is exact in one go.

    Args:
        q: queries [Hq, P, D].
        k: keys [H, P, D].
        scale: factor of the scores before the softmax.
        window: sliding window in tokens, or None.

    Returns:
        Sums [Hq, P] in float32; they add up to P a head.
    """
    import torch

    query_heads, tokens, head_dim = q.shape
    heads = k.shape[0]
    group = query_heads // heads
    sums = torch.zeros(heads, group, tokens, device=q.device)
    tile = max(1, min(tokens, _TILE_QUERIES, _TILE_BYTES // (4 * query_heads * tokens)))
    at = torch.arange(tokens, device=q.device)
    later = at[None, :tile] > at[:tile, None]  # the same in every tile: made once
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        rows = q[:, start:stop].reshape(heads, -1, head_dim).float() * scale  # [H, G * T, D]
        scores = rows @ k[:, first:stop].float().transpose(-1, -2)
        scores = scores.view(heads, group, stop - start, stop - first)
        masked = start if window is None else first  # keys before it are seen by the whole tile
        if window is None:
            hidden = later[: stop - start, : stop - start]
        else:
            key, query = at[None, masked:stop], at[start:stop, None]
            hidden = (key > query) | (key <= query - window)
        scores[..., masked - first :].masked_fill_(hidden, float("-inf"))
        sums[:, :, first:stop] += scores.softmax(-1).sum(-2)
    return sums.flatten(0, 1)
