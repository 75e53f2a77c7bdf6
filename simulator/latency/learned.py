"""What whole steps and prefills of measured models say of models between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.models import model_of_size
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.kernels import FloatArray, Kernels


class _OfModel(Protocol):
    """Anything that was learned of one model."""

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""


def by_width(
    shape: ModelShape, known: Sequence[_OfModel], values: Sequence[FloatArray]
) -> FloatArray:
    """Each known model's values, between them by the logarithm of the residual stream's width.

    Beyond the narrowest and the widest as at these.
    """
    at = np.log([each.shape.hidden_size for each in known])
    place = np.interp(np.log(shape.hidden_size), at, np.arange(len(at)))
    below = int(place)
    share = place - below
    above = min(below + 1, len(at) - 1)
    return np.asarray(values[below] * (1 - share) + values[above] * share)


def by_model(kernels: Kernels, op: str) -> list[tuple[ModelShape, list[KernelRow]]]:
    """Rows of each known model, the narrowest first."""
    found: dict[tuple[int, int, int], list[KernelRow]] = defaultdict(list)
    for row in kernels.rows(op) if kernels.has(op) else ():
        found[row.point.rows, row.point.width_in, row.point.width_out].append(row)
    shapes = {size: model_of_size(*size) for size in found}
    pairs = [(shape, found[size]) for size, shape in shapes.items() if shape]
    return sorted(pairs, key=lambda pair: pair[0].hidden_size)
