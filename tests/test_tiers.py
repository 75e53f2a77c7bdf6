"""Tests of many rows: each is tried and each that fails is named, whatever it raises."""

from __future__ import annotations

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.tests.tiers import all_hold, each


def test_every_row_that_fails_is_named_whatever_it_raises() -> None:
    @each("kind, number", [("false", 1), ("fine", 2), ("quiet", 3), ("missing", 4), ("refused", 5)])
    def check(kind: str, number: int) -> None:
        """A check."""
        assert kind != "false", "not so"
        if kind == "quiet":
            with pytest.raises(KvtuneError):
                int(number)
        if kind == "missing":
            dict[int, int]().pop(number)
        if kind == "refused":
            raise KvtuneError("no such thing")

    with pytest.raises(AssertionError) as caught:
        check()
    told = str(caught.value)
    for number, problem in ((1, "not so"), (3, "DID NOT RAISE"), (4, "KeyError"), (5, "no such")):
        (row,) = (line for line in told.splitlines() if f"'number': {number}" in line)
        assert problem in row
    assert "'number': 2" not in told
    assert (check.__name__, check.__doc__) == ("check", "A check.")


def test_marks_under_the_rows_are_the_tests() -> None:
    @pytest.mark.usefixtures("seeded")
    @each("number", [1])
    @pytest.mark.full
    def check(number: int) -> None:
        assert number

    marks = check.pytestmark  # type: ignore[attr-defined]
    assert [mark.name for mark in marks] == ["full", "usefixtures"]
    check()


def test_what_ends_a_run_is_not_collected() -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_hold([("first", stopped), ("second", lambda: pytest.fail("was tried"))])
