"""Which cases of a test belong to the default tier; all others are run by ``pytest -m full``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Values of a parameter, of which only the first ``count`` are tried by default."""
    return [
        pytest.param(value, marks=[pytest.mark.full] if at >= count else [])
        for at, value in enumerate(values)
    ]
