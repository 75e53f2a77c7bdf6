"""Which cases of a test are tried by default, and which take a test of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Values of a parameter, of which only the first ``count`` are tried by default; all others
    are run by ``pytest -m full``."""
    return [
        pytest.param(value, marks=[pytest.mark.full] if at >= count else [])
        for at, value in enumerate(values)
    ]


def each(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """As ``parametrize``, in one test: for rows that take less than a test takes to be set up.

    Args:
        names: of the check's parameters, with commas between them; it has no others.
        values: one for each name, or the one value.
    """
    words, rows = [name.strip() for name in names.split(",")], list(values)
    assert rows, "nothing would be tried"

    def of(check: Callable[..., None]) -> Callable[[], None]:
        def every() -> None:
            for value in rows:
                given = dict(zip(words, value if len(words) > 1 else [value], strict=True))
                try:
                    check(**given)
                except AssertionError as error:
                    raise AssertionError(f"{given}: {error}") from error

        every.__name__, every.__doc__ = check.__name__, check.__doc__
        return every

    return of
