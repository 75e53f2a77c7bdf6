"""Processors are those that a process may use."""

from __future__ import annotations

import os

import pytest

from kvtune.common.processors import processors


def test_a_process_that_was_given_few_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert processors() == 3


def test_without_affinity_the_machines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert processors() == 16
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors() == 1
