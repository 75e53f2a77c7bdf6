"""Engines that make traces and tables: what is named is opened, and what is not is told."""

from __future__ import annotations

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.tuner.engines import open_engine


@pytest.mark.parametrize("name", ["processes:", "processes:0", "processes:x", "two", "processes"])
def test_what_is_no_engine_is_told(name: str) -> None:
    with pytest.raises(KvtuneError, match="is no"), open_engine(name, "cpu"):
        pass


@pytest.mark.full
def test_a_scheduler_that_does_not_answer_is_told() -> None:
    pytest.importorskip("dask.distributed")
    with (
        pytest.raises(KvtuneError, match="no scheduler answers"),
        open_engine("tcp://127.0.0.1:9", "cpu"),
    ):
        pass


@pytest.mark.full
def test_processes_answer() -> None:
    with open_engine("processes:2", "cpu") as (engine, devices):
        assert engine.submit(abs, -3).result() == 3
        assert devices == ("cpu",)
