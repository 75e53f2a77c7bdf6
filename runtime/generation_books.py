"""What the caches of a generation count: entries, bytes, and which policy exceeds its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.errors import KvtuneError
from kvtune.policies.policy import footprint_of_lengths
from kvtune.policies.slots import SlotCache
from kvtune.runtime.live_policies import Group, LivePolicy
from kvtune.traces.geometry import Geometry

Entries = Callable[[SlotCache], NDArray[Any]]
"""Entries of each head of a cache."""


class Books:
    """The books of all rows of a batch.

    Args:
        layers: every layer's caches.
        policies: B of them.
        prompts: P that each reads; a row of the batch is ``policy * P + prompt``.
        geometry: of the model.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Group]],
        policies: Sequence[LivePolicy],
        prompts: int,
        geometry: Geometry,
    ) -> None:
        self._layers, self._policies, self._prompts = layers, policies, prompts
        self._shape = geometry.layers, geometry.kv_heads
        self._limits = {
            policy * prompts + prompt: live.limit_bytes
            for policy, live in enumerate(policies)
            for prompt in range(prompts)
            if live.limit_bytes is not None
        }

    @property
    def _groups(self) -> list[Group]:
        return [group for layer in self._layers for group in layer]

    def of_row(self, row: int, steps: int) -> dict[str, Any]:
        """What the caches of one row counted in so many steps, as ``GenerationRun`` names it."""
        evicted, trimmed, peak, summed, bits = (np.zeros(self._shape, np.int64) for _ in range(5))
        for layer, groups in enumerate(self._layers):
            for group in (group for group in groups if row in group.rows):
                own, at, cache = group.rows.index(row), (layer, list(group.heads)), group.cache
                evicted[at], trimmed[at] = cache.evicted[own], cache.trimmed[own]
                peak[at], summed[at] = cache.peak[own], cache.entry_steps[own]
                bits[at] = 0 if cache.method is None else cache.method.entry_bits
        return {
            "evicted": evicted,
            "trimmed": trimmed,
            "peak_entries": peak,
            "mean_bytes": self._held(lambda cache: cache.entry_steps / steps, {row})[row],
            "peak_bytes": self._held(lambda cache: cache.peak, {row})[row],
            "statistics_bytes": float((summed / steps * bits).sum() / 8),
        }

    def refuse(self, entries: Entries, does: str) -> None:
        """Refuse policies whose heads, with so many entries each at once, exceed their limit.

        Raises:
            KvtuneError: names the first.
        """
        rows = self._limits.keys()
        if not any(group.cache.grew and rows & set(group.rows) for group in self._groups):
            return
        held = self._held(entries, rows)
        for row, limit in self._limits.items():
            if held[row] > limit:
                name = self._policies[row // self._prompts].name
                raise KvtuneError(
                    f"the policy {name!r} {does} {held[row]:.0f} bytes, and {limit} are its limit",
                    hint="give its heads smaller budgets, or raise the limit.",
                )

    def _held(self, entries: Entries, rows: Set[int]) -> list[float]:
        """Bytes of rows with so many entries in each head, lengths included; of others anything."""
        total = np.full(len(self._policies) * self._prompts, footprint_of_lengths(*self._shape))
        total = total.astype(float)
        for group in self._groups:
            if rows & set(group.rows):
                total[list(group.rows)] += group.cache.bytes_of(entries(group.cache)).sum(1)
        found: list[float] = total.tolist()
        return found
