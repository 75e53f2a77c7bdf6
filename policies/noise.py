"""Random numbers that are a function of where they are used.

A draw depends on the seed and on its coordinates (head, query, key...) and on nothing else: not on
the order of draws, the batch, the slot a token happens to lie in, or the device's generator.
Replay and a live run that ask for the same coordinates therefore get the same noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# splitmix64's constants (Steele, Lea, Flood, OOPSLA 2014), as wrapping signed integers
_STEP = -7046029254386353131
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685


def gumbel(seed: int, *coordinates: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, finite.

    Args:
        seed: of all draws.
        coordinates: int64 tensors that broadcast together; put the largest one last, since all
            before it are mixed at their own size.
    """
    state = _mix(coordinates[0] + first_mixed(seed))
    for coordinate in coordinates[1:]:
        state = _mix(state * _STEP + coordinate)
    uniform = (_shift(state, 41).float() + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return -(-uniform.log()).log()


def first_mixed(seed: int) -> int:
    """What a seed adds to the first coordinate: added beforehand, it may differ from row to row."""
    return seed * _STEP % 2**63


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
