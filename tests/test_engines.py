"""Engines that make traces and tables: what is named is opened, and what is not is told."""

from __future__ import annotations

import pytest

from kvtune.common.errors import KvtuneError
from kvtune.common.processes import own_device, processes
from kvtune.tests.placed import where
from kvtune.tuner.engines import _devices, open_engine


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
    with open_engine("processes:2", "cpu") as engine:
        assert engine.submit(abs, -3).result() == 3


def test_on_a_host_with_gpus_each_process_is_to_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _devices("cuda") == ("cuda:0", "cuda:1")
    assert _devices("cpu") == ("cpu",)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_every_process_has_one_device_and_every_device_a_process(count: int) -> None:
    devices = ("cuda:0", "cuda:1")
    with processes(count, devices) as engine:
        found = set(engine.map(where, range(20 * count)))
        while len({process for process, _ in found}) < count:  # one that had not started yet
            found |= set(engine.map(where, range(4 * count)))
    assert len(found) == count, "a process keeps its device"
    assert {device for _, device in found} == set(devices)
    assert own_device("none") == "none", "the caller has none"
