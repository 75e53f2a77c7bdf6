"""Host tables on their way to the device: in one copy, for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LINE = 16
"""Numbers of a line of memory: every table begins at one, as if it had come alone."""


def sent(tables: Sequence[NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """The same tables as int32 on the device, parts of one buffer."""
    sizes = [table.size for table in tables]
    places = np.cumsum([0, *(-(-size // LINE) * LINE for size in sizes)])
    host = torch.zeros(int(places[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for at, table in zip(places, tables, strict=False):
        host.numpy()[at : at + table.size] = table.ravel()
    there = host.to(device, non_blocking=True)
    parts = zip(places, sizes, tables, strict=False)
    return [there[at : at + size].view(table.shape) for at, size, table in parts]
