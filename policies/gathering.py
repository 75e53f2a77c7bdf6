"""Rows of some tokens out of tensors that have a row a token, and the tokens that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def of_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
    """``[..., m, D]`` of ``[..., n, D]`` at the token numbers ``[..., m]``."""
    return rows.gather(-2, tokens[..., None].expand(*tokens.shape, rows.shape[-1]))


def other_tokens(tokens: Tensor, count: int) -> Tensor:
    """Of ``count`` tokens those that are not named, ascending: ``[H, count - n]`` of ``[H, n]``."""
    import torch

    left = torch.ones(len(tokens), count, dtype=torch.bool, device=tokens.device)
    left.scatter_(1, tokens, value=False)
    return left.nonzero()[:, 1].view(len(tokens), -1)
