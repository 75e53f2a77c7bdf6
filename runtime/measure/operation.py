"""What an op is: which points of a grid it has, and the calls that one point times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvtune.profiles.kernel_table import Point
from kvtune.runtime.measure.grid import Grid

Call = Callable[[], object]


class Wanted(NamedTuple):
    """A point and its turn: 0 first; what is left when time is up is not measured."""

    turn: int
    point: Point


@dataclass(frozen=True)
class Setting:
    """Where calls are prepared.

    Args:
        device: ``cuda``, or ``cpu`` in tests.
        grid: which sizes an op without points of its own takes.
    """

    device: str
    grid: Grid


@dataclass(frozen=True)
class Work:
    """The calls that are timed in turn, each on data of its own, and what one of them moves.

    Args:
        calls: the same op on different buffers; one call only where one buffer is enough.
        bytes: read and written by one call.
        flops: operations of one call.
        most_calls: of one sample, where an op is so slow that few are enough.
        steady: whether samples follow one another without a rest, as steps do when serving.
    """

    calls: Sequence[Call]
    bytes: int
    flops: int = 0
    most_calls: int = 512
    steady: bool = False


@dataclass(frozen=True)
class Operation:
    """One kind of kernel.

    Args:
        name: as it stands in the table.
        points: what is to be measured of it, in any order.
        prepare: makes the buffers of one point and the calls on them.
    """

    name: str
    points: Callable[[Grid], Iterator[Wanted]]
    prepare: Callable[[Point, Setting], Work]


def copies(grid: Grid, point: Point, bytes_each: int) -> int:
    """Buffers to rotate through, so that a cold call meets none of its data in the cache."""
    if point.l2 == "warm":
        return 1
    return max(1, -(-grid.rotation_bytes // max(1, bytes_each)))
