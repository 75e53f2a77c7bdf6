"""Seconds over one size, as measured points have them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.profiles.stack_kernels.grid import FloatArray


@dataclass(frozen=True)
class Curve:
    """Seconds over one size, straight in the logarithms; beyond the last point in proportion.

    Args:
        log_x: logarithms of the sizes, ascending.
        log_s: logarithms of the seconds, never falling.
    """

    log_x: FloatArray
    log_s: FloatArray

    @classmethod
    def of(cls, sizes: npt.ArrayLike, seconds: npt.ArrayLike) -> Curve:
        """From points in any order; doubled sizes take their median, falls are evened out."""
        x, s = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
        known = np.unique(x)
        logs = np.array([np.log(np.median(s[x == one])) for one in known])
        rising, falling = np.maximum.accumulate(logs), np.minimum.accumulate(logs[::-1])[::-1]
        return cls(np.log(known), (rising + falling) / 2)

    def at(self, sizes: npt.ArrayLike) -> FloatArray:
        """Seconds at these sizes; held below the first point."""
        x = np.log(np.maximum(np.asarray(sizes, np.float64), 1e-9))
        beyond = np.maximum(x - self.log_x[-1], 0.0)
        return np.asarray(np.exp(np.interp(x, self.log_x, self.log_s) + beyond))
