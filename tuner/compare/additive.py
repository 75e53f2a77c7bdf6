"""Allocation of losses that add up: the integer program that chooses one option for each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.simulator.quality.tables import Floats
from kvtune.tuner.exchange import Choice

_GAP = 1e-6  # of the best loss: how far the solver may stay from it


def integer_program(
    loss: Floats, footprint: NDArray[np.int64], budget: int, limit_s: float = 60.0
) -> Choice:
    """One option for each row so that the losses' sum is least and the bytes fit, ``[I]``.

    Solved by HiGHS (``scipy.optimize.milp``): a binary variable for each row and option.

    Args:
        loss: of every row's options, ``[I, O]``.
        footprint: bytes of each option, ``[O]``.
        budget: bytes of all rows together.
        limit_s: after so many seconds the best that was found is taken.

    Raises:
        KvtuneError: not even the smallest options fit, or nothing was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import identity, kron

    rows, options = loss.shape
    scale = float(np.abs(loss).max()) or 1.0
    once = LinearConstraint(kron(identity(rows), np.ones((1, options))), 1, 1)
    fits = LinearConstraint(np.tile(footprint / budget, rows)[None], -np.inf, 1.0)
    found = milp(
        loss.ravel().astype(float) / scale,
        integrality=np.ones(loss.size),
        bounds=Bounds(0, 1),
        constraints=[once, fits],
        options={"mip_rel_gap": _GAP, "time_limit": limit_s},
    )
    if found.x is None:
        raise KvtuneError(
            f"no option for each layer fits into {budget} bytes",
            hint="a larger share of the bytes, or a finer menu, has plans that fit.",
        )
    choice: Choice = found.x.reshape(rows, options).argmax(1).astype(np.int64)
    return choice
