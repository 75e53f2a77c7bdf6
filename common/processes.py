"""Processes of this host that share its devices out: each has one of its own, for all its tasks.

A task that brought its device along would be run by whichever process is free, and every process
would soon hold a model on every GPU.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_own: list[str] = []  # at most one; of a process that was given none it stays empty


def processes(count: int, devices: Sequence[str]) -> ProcessPoolExecutor:
    """So many processes; the first has the first device, and so on by turns.

    Args:
        count: of processes.
        devices: as torch names them; with more processes than devices some share one.
    """
    context = multiprocessing.get_context("spawn")
    waiting = context.SimpleQueue()
    for number in range(count):
        waiting.put(devices[number % len(devices)])
    return ProcessPoolExecutor(count, context, initializer=_take_device, initargs=(waiting,))


def own_device(otherwise: str) -> str:
    """The device of this process; ``otherwise`` in one that was given none."""
    return _own[0] if _own else otherwise


def _take_device(waiting: Any) -> None:
    _own.append(waiting.get())
