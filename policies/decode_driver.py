"""The one driver of a decode step: replay, live generation and the paged runtime step through it.

    prepare  on the host: how many entries of each head will leave
    enter    the newest token takes a place, and the method's statistics of it begin
    observe  the method is shown what the token attended to, itself included
    leaving  which entries leave
    count    on the host: what is held now

Where keys and values lie is not its business: ``policies/slots.py`` keeps them in slots that stay
where they are, ``runtime/cache/evicting.py`` in pages, of which the last fill what becomes empty.
Nothing here waits for the device, and its tensors stay where they lie, so that the steps in between
can be replayed as a graph.
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
        sizes: entries of each head before the step, ``[B, H]``, known without asking the device.
        drops: entries of each head that leave in this step, ``[B, H]``.
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
        self.drops = np.zeros_like(sizes)
        self._newest = state.newest = torch.full_like(state.positions[:, :, :1], state.now)
        self._sent: tuple[bytes, Tensor] | None = None
        if method is not None:
            method.check_heads(budgets)
            state.pinned = method.pin(budgets, state.positions.device)

    def prepare(self) -> None:
        """Begin a step: say how many entries will leave."""
        self.state.generated += 1
        if self.method is not None:
            self.drops = self.method.drops(self.sizes + 1, self.budgets, self.state.generated)

    def enter(self, place: Tensor, keys: Tensor, values: Tensor) -> None:
        """Note the newest token.

        Args:
            place: of it in each head, ``[B, H, 1]`` int64.
            keys: of it after RoPE, ``[B, H, D]``.
            values: likewise.
        """
        self._newest += 1
        self.state.positions.scatter_(-1, place, self._newest)
        if self.method is not None:
            self.method.enter(self.state, place, keys, values)

    def observe(self, attention: Tensor) -> None:
        """Show the method what the newest token attended to, ``[B, H, G, n]``."""
        if self.method is None:
            return
        state, held = self.state, dict(self.state.statistics)
        self.method.observe(state, attention)
        found, state.statistics = state.statistics, held
        for name, tensor in held.items():
            if found[name] is not tensor:
                tensor.copy_(found[name])

    def leaving(self) -> Tensor:
        """Which entries leave, ``[B, H, n]`` bool."""
        if self.method is None:
            return torch.zeros_like(self.state.live)
        return self.method.leaving(self.state, self.sent_drops(), int(self.drops.max()))

    def sent_drops(self) -> Tensor:
        """``drops`` on the device, sent only where they differ from the last ones."""
        key = self.drops.tobytes()
        if self._sent is None or self._sent[0] != key:
            self._sent = key, torch.from_numpy(self.drops).to(self.state.positions.device)
        return self._sent[1]

    def count(self) -> None:
        """End a step."""
        self.sizes += 1
        self.sizes -= self.drops

    def forget(self, stays: NDArray[np.bool_]) -> None:
        """Go on with those of the first dimension that stay, flags ``[B]``."""
        self.budgets, self.sizes = self.budgets[stays], self.sizes[stays]
        self.drops, self._sent = self.drops[stays], None
        state, at = self.state, torch.from_numpy(stays).to(self.state.positions.device)
        state.positions = state.positions[at]
        state.statistics = {name: tensor[at] for name, tensor in state.statistics.items()}
        if state.pinned is not None:
            state.pinned = state.pinned[0][at], state.pinned[1][at]
        self._newest = state.newest = self._newest[at]

    def kept(self) -> list[list[list[int]]]:
        """Positions that each head holds, ascending, ``[B][H]``."""
        return [
            [sorted(position for position in head if position != FREE) for head in row]
            for row in self.state.positions.tolist()
        ]
