"""Segments of a layer's rows: their kinds, where they lie, and what leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvtune.runtime.cache.backend import Moves

Ints = NDArray[np.int64]

CODED, GROWN, SETTLED = range(3)
"""Kinds of segments; a row's segment of a kind has the number ``kind * rows + row``."""

NO_END = np.iinfo(np.int64).max // 2
"""Of a row that only grows: the most entries that it may hold."""

NOWHERE = -1
"""Instead of a cell: of a row whose pages have no tables."""


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


def runs(counts: Ints, first: Ints | int = 0) -> Ints:
    """So many numbers one after another, then as many again: each run from its own first one."""
    before = counts.cumsum() - counts
    found: Ints = np.arange(counts.sum()) + np.repeat(first - before, counts)
    return found
