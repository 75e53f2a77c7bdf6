"""Some layers of a prompt that have read it and are yet to be compressed, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtune.policies.signals import Signals


@dataclass
class Reading:
    """Neighbouring layers of one prompt, as if they were one of more heads.

    Args:
        keys: ``[layers * H, P, D]``, filled in layer by layer.
        values: likewise.
        scale: of the logits.
        layers: which ones these are.
        queries: the last ones of each layer that has been added, ``[Hq, W, D]``.
        sums: attention that each key of these layers drew, ``[Hq, P]``, where methods ask for it.
    """

    keys: Tensor
    values: Tensor
    scale: float
    layers: range
    queries: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, layers: range, keys: Tensor, scale: float) -> Reading:
        """Room for some layers of keys and values like these, ``[P, H, D]``."""
        tokens, heads, head_dim = keys.shape
        shape = len(layers) * heads, tokens, head_dim
        return cls(keys.new_empty(shape), keys.new_empty(shape), scale, layers)

    def add(self, keys: Tensor, values: Tensor, queries: Tensor, sums: Tensor | None) -> None:
        """The next layer's keys and values ``[P, H, D]``; its last queries and its sums."""
        first = len(self.queries) * keys.shape[1]
        rows = slice(first, first + keys.shape[1])
        self.keys[rows], self.values[rows] = keys.transpose(0, 1), values.transpose(0, 1)
        self.queries.append(queries)
        if sums is not None:
            self.sums.append(sums)

    @property
    def is_whole(self) -> bool:
        """Whether all of the layers have been added."""
        return len(self.queries) == len(self.layers)

    @property
    def signals(self) -> Signals:
        """What methods may look at."""
        sums = torch.cat(self.sums) if self.sums else None
        queries = torch.cat(self.queries)
        return Signals(queries, self.keys, self.values, self.scale, sums, layer=self.layers.start)
