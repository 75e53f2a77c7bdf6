"""Sums over GPUs that share each layer: two a layer, of a row of hidden width for each token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors
from kvtune.simulator.latency.answers import Times


def sums_over_gpus(shape: ModelShape, gpu: GpuProfile, gpus: int, rows: npt.ArrayLike) -> Times:
    """Seconds that one pass of a model spends on sums, from the datasheet of the link.

    Args:
        shape: the whole model.
        gpu: one of the cards.
        gpus: that share each layer; with 1 there is nothing to sum.
        rows: tokens of a pass, any shape.
    """
    tokens = np.asarray(rows, dtype=np.float64)
    moved = 2 * (gpus - 1) / gpus * 2 * tokens * shape.hidden_size
    link = priors.LINK_BYTES_PER_S.get((gpu.architecture, gpu.memory_kind), gpu.pcie_bytes_per_s)
    passes = 2 * shape.layers if gpus > 1 else 0
    value, low, high = (
        passes
        * (getattr(priors.SUM_FLOOR_S, end) + moved / (link * getattr(priors.LINK_SHARE, other)))
        for end, other in (("value", "value"), ("low", "high"), ("high", "low"))
    )
    return Times(value, low, high, "datasheet")
