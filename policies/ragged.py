"""Kept tokens of heads with budgets of their own, chosen in one pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.policies.method import ScoredMethod


def limits(method: ScoredMethod, budgets: Sequence[int], tokens: int) -> NDArray[np.int64]:
    """Of each head ``[H, 4]``: its budget, first and last tokens it protects, and prompt tokens.

    No budget may be larger than the prompt.
    """
    each, heads = np.unique(budgets, return_inverse=True)
    known = [(budget, *method.protected_within(budget), tokens) for budget in each.tolist()]
    return np.array(known, np.int64).reshape(-1, 4)[heads]


def keep_each(scores: Tensor, limits: Tensor, kept_tokens: int) -> Tensor:
    """Tokens of highest score after the protected ones, one head's list after another's.

    The same tokens as ``ScoredMethod.keep`` names for each head under its own budget. Heads may be
    of prompts of different lengths. Nothing waits for the device, and the number of operations does
    not depend on how many heads, budgets and lengths there are.

    Args:
        scores: ``[H, P]`` float32; minus infinity behind shorter prompts.
        limits: as ``limits`` gives them, integers on the device of the scores.
        kept_tokens: the sum of all budgets.

    Returns:
        Token indices, ascending within a head, ``[kept_tokens]`` int64.
    """
    import torch

    heads, longest = scores.shape
    budgets, first, last, tokens = limits.long().T[..., None]
    at = torch.arange(longest, device=scores.device)
    protected = (at < first) | ((at >= tokens - last) & (at < tokens))
    newest_first = scores.masked_fill(protected, torch.inf).flip(-1)
    best = longest - 1 - newest_first.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(protected).scatter_(1, best, at < budgets)
    place = kept.cumsum(-1) + (budgets.cumsum(0) - budgets - 1)
    found = at.new_empty(kept_tokens + 1)  # the last place is for all tokens that are dropped
    found.scatter_(0, place.where(kept, kept_tokens).flatten(), at.repeat(heads))
    return found[:kept_tokens]
