"""Bytes of entries that lie in slots, each by itself; runs without torch."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.format import Format, Role
from kvtune.policies.formats.bf16 import Bf16

Forms = tuple[Format, Format]
"""Of keys and of values."""
EXACT: Forms = (Bf16(), Bf16())
ROLES: tuple[Role, Role] = ("keys", "values")


def held_bytes(
    entries: NDArray[Any], forms: Forms, residual: int, statistics_bits: int, head_dim: int
) -> NDArray[np.float64]:
    """Bytes of so many entries of a head, two residual windows in 16 bits; runs without torch.

    One stays so, and another fills until its tokens are stored together.
    """
    exact, stored = _entry_bytes(EXACT, head_dim), _entry_bytes(forms, head_dim)
    found: NDArray[np.float64] = entries * (stored + statistics_bits / 8)
    found += np.minimum(entries, 2 * residual) * (exact - stored)
    return found


@cache
def _entry_bytes(forms: Forms, head_dim: int) -> int:
    """Bytes of one token's key and value."""
    return sum(form.bound(1, head_dim, role) for form, role in zip(forms, ROLES, strict=True))


def stores_apart(form: Format) -> bool:
    """Whether every token is stored by itself, so that it can leave without the others."""
    many = 4096  # as long as groups get
    return not form.bytes_vary and all(
        form.bound(many, 64, role) == many * form.bound(1, 64, role) for role in ROLES
    )
