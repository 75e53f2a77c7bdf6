"""Sliding-window layers: a row is a ring of as many places as the window has tokens.

A query at position i sees the keys in (i - window, i], so that the token that enters takes the
place of the one that has just become invisible; where that was never kept, it takes a fresh place.
Which place that is follows from what was kept of the prompt alone, and repeats with the window: a
table in device memory, which a captured graph reads without the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.policies.placement import chooses_entries
from kvtune.runtime.cache.segments import Ints


@dataclass
class Ring:
    """Where the new tokens of a layer's rows go.

    Args:
        places: ``[rows, window]``; the g-th new token of a row takes place ``g % window`` of these.
        entered: new tokens so far, as far as the host knows.
    """

    places: Ints
    entered: int = 0

    def after(self, lengths: Ints, tokens: int) -> Ints:
        """Places in use ``[rows]`` when so many more tokens have entered."""
        window = self.places.shape[1]
        turn = (self.entered + np.arange(min(tokens, window))) % window
        ends: Ints = np.maximum(lengths, self.places[:, turn].max(1, initial=-1) + 1)
        return ends

    def tables(self) -> tuple[Ints, Ints]:
        """The places, and how many tokens have entered each row."""
        return self.places, np.full(len(self.places), self.entered)


def places_of(kept: Sequence[Tensor], read: Sequence[int], window: int) -> Ints:
    """``Ring.places`` of some rows; waits for the device once.

    Args:
        kept: of the prompt's last tokens, those that each row keeps, ascending.
        read: how many last tokens of each row's prompt were to be chosen from; the window at most.
        window: tokens that a query sees, itself included.
    """
    found = []
    ends = np.cumsum([len(row) for row in kept])
    for row, count in zip(
        np.split(torch.cat(list(kept)).cpu().numpy(), ends[:-1]), read, strict=True
    ):
        leaves = np.arange(window) - (window - count)  # which one does so as the g-th enters
        place = np.full(window, -1)
        place[row] = np.arange(len(row))
        mine = np.where(leaves < 0, -1, place[leaves])
        fresh = mine < 0
        mine[fresh] = len(row) + np.arange(fresh.sum())
        found.append(mine)
    return np.stack(found)


def check_sliding(layer: int, window: int, options: Sequence[Option]) -> None:
    """Refuse heads of a sliding layer that would have to let go of what is not in 16-bit pages.

    Raises:
        KvtuneError: names the layer.
    """
    for option in options:
        if chooses_entries(option):
            raise KvtuneError(
                f"layer {layer} slides over {window} tokens, and {option.label!r} chooses among "
                "entries that would have to leave",
                hint="give sliding layers a method without a reader, or take a smaller new_tokens "
                "if none will leave.",
            )
        if {option.keys, option.values} != {Bf16()}:
            raise KvtuneError(
                f"layer {layer} slides over {window} tokens, and {option.label!r} would quantise "
                "what is to leave it token by token",
                hint="use bf16 in sliding layers, or a smaller new_tokens if none will leave.",
            )
