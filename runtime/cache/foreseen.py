"""What a batch's pages will take by its end, foreseen from its prompts' lengths and budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.host_pages import landing_cells
from kvtune.policies.paging import Growth, head_pages, spare_pages, splits
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import Pages, pool_cells
from kvtune.traces.geometry import Geometry

Budgets = NDArray[np.int64]


def cells_for(
    policy: Policy, geometry: Geometry, growth: Growth, sequences: Sequence[tuple[int, Budgets]]
) -> int:
    """Cells of a pool that holds some sequences at their ends.

    Args:
        policy: whose heads hold them.
        geometry: of the model.
        growth: what follows the prompts.
        sequences: each one's prompt tokens, and its heads' budgets ``[L, H]``.
    """
    distinct = {id(budgets): (tokens, budgets) for tokens, budgets in sequences}
    counts = Counter(id(budgets) for _, budgets in sequences)
    pages = Pages()
    for name, (tokens, budgets) in distinct.items():
        for layout, count in pages_wanted(policy, geometry, growth, tokens, budgets).items():
            pages[layout] += counts[name] * count
    longest = max((tokens for tokens, _ in sequences), default=0)
    return pool_cells(pages) + landing_cells(policy, longest, geometry.head_dim, len(sequences))


def window_of(geometry: Geometry, layer: int, prompt_tokens: int, new_tokens: int) -> int | None:
    """A layer's sliding window, if a sequence will exceed it."""
    window = geometry.windows[layer]
    return None if window is None or prompt_tokens + new_tokens <= window else window


def pages_wanted(
    policy: Policy, geometry: Geometry, growth: Growth, tokens: int, budgets: Budgets
) -> Pages:
    """By one sequence, at its end; some more a head where budgets may still be split anew."""
    pages, head_dim, split = Pages(), geometry.head_dim, splits(policy)
    for layer, (options, planned) in enumerate(zip(policy.heads, budgets, strict=True)):
        window = window_of(geometry, layer, tokens, growth.new_tokens)
        for option, count in zip(options, planned.tolist(), strict=True):
            theirs = head_pages(option, count, tokens, head_dim, growth, window)
            pages += theirs
            if split:
                pages += spare_pages(option, theirs, head_dim)
    return pages
