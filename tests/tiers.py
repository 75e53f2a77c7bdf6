"""Which cases of a test are tried by default, and which take a test of their own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Values of a parameter, of which only the first ``count`` are tried by default; all others
    are run by ``pytest -m full``."""
    return [
        pytest.param(value, marks=[pytest.mark.full] if at >= count else [])
        for at, value in enumerate(values)
    ]


def all_hold(checks: Iterable[tuple[object, Callable[[], object]]]) -> None:
    """Run every check, also behind one that fails, and name all that did.

    Args:
        checks: each with its name.
    """
    failed: list[tuple[object, BaseException]] = []
    for name, check in checks:
        try:
            check()
        except (Exception, pytest.fail.Exception) as error:  # the latter is "DID NOT RAISE"
            failed.append((name, error))
    if failed:
        raise AssertionError("\n".join(_told(*each) for each in failed)) from failed[0][1]


def _told(name: object, error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name}: {type(error).__name__} in {place.name}, line {place.lineno}: {error}"


def each(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """As ``parametrize``, in one test: for rows that take less than a test takes to be set up.

    Marks of the check are the test's.

    Args:
        names: of the check's parameters, with commas between them; it has no others.
        values: one for each name, or the one value.
    """
    words = [name.strip() for name in names.split(",")]
    rows = [dict(zip(words, value if len(words) > 1 else [value], strict=True)) for value in values]
    assert rows, "nothing would be tried"

    def of(check: Callable[..., None]) -> Callable[[], None]:
        def every() -> None:
            all_hold((row, partial(check, **row)) for row in rows)

        every.__name__, every.__doc__ = check.__name__, check.__doc__
        every.__dict__["pytestmark"] = list(getattr(check, "pytestmark", []))
        return every

    return of
