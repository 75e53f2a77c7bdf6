"""Numbers that are added to those of a format at single places, listed by token.

As compressed columns of a sparse matrix (Hooper et al., "KVQuant", 2024, keep keys' outliers so):
whoever reads some tokens finds theirs side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.packed import STEP

if TYPE_CHECKING:
    from torch import Tensor

_EACH = 4  # bytes: a 16-bit number and its 16-bit place
_START = 4  # of 32 tokens: where theirs begin
_CHANNELS = 1024  # of a head at most


def outlier_bytes(count: int, tokens: int) -> int:
    """Bytes of so many outliers of so many tokens; nothing for none."""
    return _EACH * count + _START * (-(-tokens // STEP) + 1) if count else 0


def outlier_buffers(rest: Tensor, places: Tensor, role: Role) -> dict[str, Tensor]:
    """What is to be added at some places; no buffers for none.

    Args:
        rest: what the format's own numbers lack, ``[n, D]``.
        places: of outliers, int64 ``[R, k]``: tokens of each channel of keys, channels of each
            token of values.
        role: which of them.
    """
    import torch

    if not places.numel():
        return {}
    row = torch.arange(len(places), device=places.device).repeat_interleave(places.shape[1])
    token, channel = (places.flatten(), row) if role == "keys" else (row, places.flatten())
    order = token.argsort(stable=True)
    token, channel = token[order], channel[order]
    steps = torch.arange(-(-len(rest) // STEP) + 1, device=rest.device)
    return {
        "outliers": rest[token, channel].half(),
        "places": (token % STEP * _CHANNELS + channel).to(torch.int16),
        "starts": torch.searchsorted(token // STEP, steps).int(),
    }


def with_outliers(rows: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
    """Rows ``[n, D]`` float32 and the outliers, where there are any."""
    import torch

    if "outliers" not in buffers:
        return rows
    place, ends = buffers["places"].long(), buffers["starts"][1:].long()
    number = torch.ones_like(place).cumsum(0) - 1
    step = torch.searchsorted(ends, number, right=True)  # of a size that does not depend on data
    token = STEP * step + place // _CHANNELS
    return rows.index_put((token, place % _CHANNELS), buffers["outliers"].float(), accumulate=True)
