"""What readers share: ends that are always read, the best of the rest, the votes of a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.rotary import turn
from kvtune.policies.reader import Held, Memory, Reader

if TYPE_CHECKING:
    from torch import Tensor


def ends(budget: int, sinks: int, recent: int) -> tuple[int, int]:
    """First and last entries that are always read: as published, or half of a small budget.

    At least the last one is.
    """
    if 2 * (sinks + recent) <= budget and recent:
        return sinks, recent
    room = max(min(budget // 2, sinks + recent), 1)
    first = min(room * sinks // max(sinks + recent, 1), room - 1)
    return first, room - first


def between(held: Held, first: int, last: int) -> Tensor:
    """Entries of each row that lie between its ends, ``[R, n]`` bool."""
    import torch

    place = torch.arange(held.keys.shape[1], device=held.keys.device)
    return (place >= first) & (place < held.counts[:, None] - last)


def best(held: Held, worth: Tensor, first: int, last: int, budget: int) -> Tensor:
    """The ends, and as many entries of the rest as the budget leaves, ``[R, C, n]`` bool.

    Args:
        held: what there is.
        worth: of every entry to each query, ``[R, C, n]``; minus infinity is never read.
        first: entries at the start that are always read.
        last: entries at the end, likewise.
        budget: entries in all.
    """
    import torch

    at_ends = ~between(held, first, last)
    ranked = worth.masked_fill(at_ends[:, None], torch.inf)
    ranked = ranked.masked_fill(~held.real[:, None], -torch.inf)
    found = ranked.topk(min(budget, worth.shape[-1]), -1)
    flags = torch.zeros_like(ranked, dtype=torch.bool)
    return flags.scatter_(-1, found.indices, found.values > -torch.inf)


def of_layer(worth: Tensor, policies: Tensor) -> Tensor:
    """The sum over the heads of each row's layer, ``[R, ...]`` like ``worth``."""
    import torch

    total = torch.zeros_like(worth)  # a row for each policy, of which there are no more than rows
    return total.index_add_(0, policies, worth)[policies]


def clamped_queries(held: Held, queries: Tensor, distance: int) -> Tensor:
    """Queries ``[R, G, C, D]`` as if each stood ``distance`` tokens behind all of
    ``clamped_keys``; as they are in a model without RoPE."""
    import torch

    rope = held.signals.rope
    if rope is None:
        return queries
    at = held.start + torch.arange(queries.shape[2], device=queries.device)
    return turn(queries, distance - at, rope)


def clamped_keys(held: Held) -> Tensor:
    """Keys ``[R, n, D]`` as if all stood at one place; as they are in a model without RoPE."""
    rope = held.signals.rope
    return held.keys if rope is None else turn(held.keys, -held.tokens, rope)


@dataclass(frozen=True)
class MiddleBlocks(Reader):
    """Ranks blocks of the entries between the ends.

    Args:
        block: entries of a block; the last one may be shorter.
        budget: entries read.
        first: at the start, always read.
        last: at the end, likewise.
    """

    block: int
    budget: int
    first: int
    last: int

    @abstractmethod
    def index(self, held: Held) -> dict[str, Tensor]:
        """What stands for each row's blocks, by name, ``[R, b, ...]``."""

    @abstractmethod
    def score(self, held: Held, queries: Tensor, index: Mapping[str, Tensor]) -> Tensor:
        """The score of every block, ``[R, C, b]``; minus infinity where it is empty."""

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """The ends and whole blocks of highest score."""
        return self.whole_blocks(held, self.score(held, queries, self.index(held)))

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same by an index made once."""
        if not memory:
            memory.update(self.index(held))
        return self.whole_blocks(held, self.score(held, query, memory))[:, -1]

    def in_blocks(self, entries: Tensor, fill: float) -> Tensor:
        """``[R, n, ...]`` after the first ones as ``[R, b, block, ...]``."""
        import torch

        rest = entries[:, self.first :]
        missing = -rest.shape[1] % self.block
        pad = rest.new_full((len(rest), missing, *rest.shape[2:]), fill)
        blocks: Tensor = torch.cat([rest, pad], 1).unflatten(1, (-1, self.block))
        return blocks

    def whole_blocks(self, held: Held, worth: Tensor) -> Tensor:
        """The ends, and as many blocks as fit into the budget beside them, ``[R, C, n]`` bool."""
        import torch

        wanted = min((self.budget - self.first - self.last) // self.block, worth.shape[-1])
        found = worth.topk(max(wanted, 0), -1)
        flags = torch.zeros_like(worth, dtype=torch.bool)
        flags.scatter_(-1, found.indices, found.values > -torch.inf)
        unread = ~flags.repeat_interleave(self.block, -1)
        entries = held.keys.shape[1]
        ranked = torch.zeros(*worth.shape[:2], entries, device=worth.device)
        middle = ranked[..., self.first :]
        middle.masked_fill_(unread[..., : middle.shape[-1]], -torch.inf)
        return best(held, ranked, self.first, self.last, self.budget)

    def entries_read(self, entries: int) -> int:
        """Most entries that a step reads."""
        return min(entries, self.budget)
