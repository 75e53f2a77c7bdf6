"""A limit on the pool of pages bounds a cache only where pages hold all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.common.units import format_bytes
from kvtune.policies.placement import lies_beside
from kvtune.policies.policy import Policy
from kvtune.policies.slabs import SLAB_CELLS
from kvtune.runtime.cache.pool import Pool


class LimitedPool(Pool):
    """A pool that never exceeds a limit.

    Args:
        cell_bytes: as of any pool.
        device: where the memory is.
        limit_bytes: None for no limit.
    """

    def __init__(self, cell_bytes: int, device: Any, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(0, cell_bytes, device)

    def extend(self, cells: int) -> None:
        """Take so many cells more.

        Raises:
            KvtuneError: they would exceed the limit; nothing is taken.
        """
        wanted = self.memory.numel() + self.bytes_of(cells)
        if self.limit_bytes is not None and wanted > self.limit_bytes:
            raise KvtuneError(
                f"the cache's pages would take {format_bytes(wanted)}, and its limit is "
                f"{format_bytes(self.limit_bytes)}",
                hint="give its heads smaller budgets, make it for fewer new_tokens, or raise "
                "limit_bytes.",
            )
        super().extend(cells)

    def within_limit(self, cells: int) -> int:
        """So many cells, or as many slabs as the limit leaves, if it leaves one."""
        if self.limit_bytes is None:
            return cells
        slabs = (self.limit_bytes - self.memory.numel()) // self.bytes_of(1)
        return min(cells, slabs * SLAB_CELLS) if slabs > 0 else cells


def check_limit(policy: Policy, budgets: Mapping[int, NDArray[np.int64]], head_dim: int) -> None:
    """Refuse heads that would hold some of a prompt where the limit does not count it.

    Args:
        policy: whose cache is limited.
        budgets: of its heads ``[L, H]``, by a prompt's tokens.
        head_dim: D.

    Raises:
        KvtuneError: names the first such option.
    """
    for prompt_tokens, planned in budgets.items():
        for option, budget in dict.fromkeys(
            zip(policy.options(), planned.ravel().tolist(), strict=True)
        ):
            if lies_beside(option, budget, prompt_tokens, head_dim):
                raise KvtuneError(
                    f"{option.label!r} holds entries beside the pages, which limit_bytes would "
                    "not count",
                    hint="leave out limit_bytes, or take a method whose entries pages hold (of "
                    "readers quest or landmark with block: 64).",
                )
