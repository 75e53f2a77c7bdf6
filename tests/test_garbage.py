"""What is kept for good is left alone by the garbage collector, which then goes on."""

from __future__ import annotations

import gc

import pytest

from kvtune.common.garbage import kept_for_good


def test_objects_made_within_are_not_searched_again() -> None:
    before = gc.get_freeze_count()
    try:
        with kept_for_good():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()


def test_the_collector_goes_on_after_a_failure() -> None:
    with pytest.raises(KeyError), kept_for_good():
        raise KeyError
    gc.unfreeze()
    assert gc.isenabled()
