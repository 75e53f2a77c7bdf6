"""A limit on the pool of pages bounds a cache only where pages hold all of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.placement import lies_beside
from kvtune.policies.policy import Policy


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
