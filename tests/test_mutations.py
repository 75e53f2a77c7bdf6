"""Every fault that is planted to try the tests has a place in the source, once."""

from __future__ import annotations

import pytest

from kvtune.benchmarks.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("fault", MUTATIONS, ids=lambda fault: fault.what)
def test_each_planted_fault_changes_one_place(fault: Mutation) -> None:
    assert (ROOT / fault.file).read_text("utf-8").count(fault.old) == 1
    assert all((ROOT / "tests" / guard).is_file() for guard in fault.guards)
