"""Segments of a layer's rows: their kinds, how prompts fill them, and what leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvtune.runtime.backend import Moves
from kvtune.runtime.kernels.layout import PAGE

Ints = NDArray[np.int64]

CODED, GROWN, SETTLED = range(3)
"""Kinds of segments; a row's segment of a kind has the number ``kind * rows + row``."""

NO_END = np.iinfo(np.int64).max // 2
"""Of a row that only grows: the most entries that it may hold."""


@dataclass(frozen=True)
class Leaving:
    """Entries that leave growing segments: the last ones move to where they were.

    Args:
        rows: whose, ``[n]``.
        moves: likewise.
        counts: entries that leave each, ``[n]``.
        on_device: the same as int32 on the device, so that nobody waits.
    """

    rows: Ints
    moves: Moves
    counts: Ints
    on_device: Tensor


def records_of(
    head: int, first: int, count: int, cells: Ints, which: int, row: int, rows: int
) -> NDArray[np.int64]:
    """``Writing.records`` of one segment."""
    start = np.arange(len(cells)) * PAGE
    columns = (head, first + start, np.minimum(count - start, PAGE), cells, which * rows + row)
    return np.stack(np.broadcast_arrays(*columns), axis=1)
