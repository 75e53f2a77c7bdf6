"""Pooling of token scores over their neighbours, so that a kept token keeps its surroundings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["max", "mean"]


def check_kernel(method: str, kernel: int) -> None:
    """Refuse an even kernel: it has no middle token."""
    if kernel % 2 == 0:
        raise KvtuneError(f"{method} pools over an odd kernel, not {kernel}")


def pooled(scores: Tensor, kernel: int, pooling: Pooling, protected: int) -> Tensor:
    """Scores ``[H, G, P]`` pooled among the tokens before the last ``protected`` ones.

    Those are kept whatever their score; letting them into the pool would carry the attention that
    the window pays to itself over to its neighbours. A mean counts the zeros beyond the ends.
    """
    import torch
    import torch.nn.functional as F

    prefix = max(scores.shape[-1] - protected, 0)
    if prefix == 0:
        return scores
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    smooth = pool(scores[..., :prefix], kernel, stride=1, padding=kernel // 2)
    return torch.cat((smooth, scores[..., prefix:]), -1)
