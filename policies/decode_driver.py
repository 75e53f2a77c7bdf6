"""The one driver of a decode step: replay, live generation and the paged runtime step through it.

    enter    the newest token takes a place, and the method's statistics of it begin
    observe  the method is shown what the token attended to, itself included
    drops    how many entries of each head leave now
    leaving  which

Where keys and values lie is not its business: ``policies/slots.py`` keeps them in slots that stay
where they are, ``runtime/cache/evicting.py`` in pages that are moved together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.decode import FREE, DecodeMethod, DecodeState


class DecodeDriver:
    """Counts and statistics of some heads of one layer, for several policies that share a method.

    Attributes:
        sizes: entries of each head, ``[B, H]``, known without asking the device.
        state: what is remembered of them, ``[B, H, n]``.
    """

    def __init__(
        self,
        method: DecodeMethod | None,
        budgets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        state: DecodeState,
    ) -> None:
        """Begin behind a prompt.

        Args:
            method: evicts; None for heads that only grow.
            budgets: entries that may stay, ``[B, H]``; not read without a method.
            sizes: entries that are held, ``[B, H]``.
            state: what is remembered of them.

        Raises:
            KvtuneError: the method cannot evict under these budgets.
        """
        self.method, self.budgets, self.sizes, self.state = method, budgets, sizes, state
        self._sent: tuple[bytes, Tensor] | None = None
        if method is not None:
            method.check_heads(budgets)
            state.pinned = method.pin(budgets, state.positions.device)

    def enter(self, place: Tensor, keys: Tensor, values: Tensor) -> None:
        """Note the newest token.

        Args:
            place: of it in each head, ``[B, H, 1]`` int64.
            keys: of it after RoPE, ``[B, H, D]``.
            values: likewise.
        """
        state = self.state
        state.generated += 1
        state.positions.scatter_(-1, place, state.now)
        if self.method is not None:
            self.method.enter(state, place, keys, values)
        self.sizes += 1

    def observe(self, attention: Tensor) -> None:
        """Show the method what the newest token attended to, ``[B, H, G, n]``."""
        if self.method is not None:
            self.method.observe(self.state, attention)

    def drops(self) -> NDArray[np.int64] | None:
        """How many entries leave each head now, ``[B, H]``; None where none does.

        They are no longer counted in ``sizes``.
        """
        if self.method is None:
            return None
        drops = self.method.drops(self.sizes, self.budgets, self.state.generated)
        if not drops.any():
            return None
        self.sizes -= drops
        return drops

    def leaving(self, drops: NDArray[np.int64]) -> Tensor:
        """Which entries leave, ``[B, H, n]`` bool."""
        if self.method is None:
            return torch.zeros_like(self.state.live)
        return self.method.leaving(self.state, self.sent(drops), int(drops.max()))

    def sent(self, drops: NDArray[np.int64]) -> Tensor:
        """The counts on the device, sent only where they differ from the last ones."""
        key = drops.tobytes()
        if self._sent is None or self._sent[0] != key:
            self._sent = key, torch.from_numpy(drops).to(self.state.positions.device)
        return self._sent[1]

    def kept(self) -> list[list[list[int]]]:
        """Positions that each head holds, ascending, ``[B][H]``."""
        return [
            [sorted(position for position in head if position != FREE) for head in row]
            for row in self.state.positions.tolist()
        ]
