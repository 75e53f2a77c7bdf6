"""What a decode step reads of what a KV head holds: the contract of a reader.

A reader drops nothing that its method holds. For every query, in order, it says which entries the
KV head attends to; generated tokens are always read. ``reads`` says it of many queries at once, as
replay asks; ``follow`` of one after another, as the runtime does, and may remember what later steps
need: an index, the last selection, a running mean. Readers that divide a head into equal blocks and
rank them by an index of the keys alone (``BlockReader``) may also choose among pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.policies.signals import Signals

Memory = dict[str, Any]
"""What a reader remembers from step to step, by name: tensors or lists, each with an item a row."""


@dataclass(frozen=True, eq=False)
class Held:
    """What a reader is shown: rows, each a KV head of one layer under one policy.

    Args:
        keys: ``[R, n, D]`` float32 as they are stored; of row r the first ``counts[r]`` are real.
        counts: ``[R]`` int64.
        tokens: the prompt token of each entry, ``[R, n]`` int64.
        heads: the KV head of each row, ``[R]`` int64.
        policies: rows with the same number are heads of one policy, ``[R]`` int64, all below R.
        signals: of the layer's prompt.
        start: position of the first query; P where the queries follow the prompt.
    """

    keys: Tensor
    counts: Tensor
    tokens: Tensor
    heads: Tensor
    policies: Tensor
    signals: Signals
    start: int

    @property
    def real(self) -> Tensor:
        """Entries that are there, ``[R, n]`` bool."""
        import torch

        return torch.arange(self.keys.shape[1], device=self.keys.device) < self.counts[:, None]


@dataclass(frozen=True)
class Reader(ABC):
    """Selects entries of a head, query by query."""

    @abstractmethod
    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """Which entries each query of a KV head attends to, ``[R, C, n]`` bool.

        Args:
            held: what there is.
            queries: of each row's group, one position after the other, ``[R, G, C, D]`` float32.
        """

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """Which entries one step attends to, ``[R, n]`` bool; steps come in order.

        To override where steps depend on one another, or what does not change is costly to make.
        Whoever does is shown the prompt's own queries and keys in the first step alone.

        Args:
            held: what there is; ``start`` is the query's position.
            query: ``[R, G, 1, D]`` float32.
            memory: empty in the first step; changed.
        """
        return self.reads(held, query)[:, -1]

    @abstractmethod
    def entries_read(self, entries: int) -> int:
        """Entries that a step reads of a head that holds so many: the most, or the mean over steps
        where ``is_scheduled``."""

    def most_read(self, entries: int, step: int) -> int:
        """Entries that a step reads at most; to override where steps differ by plan.

        Args:
            entries: held.
            step: number of the step, 0 behind the prompt.
        """
        return self.entries_read(entries)

    @property
    def is_scheduled(self) -> bool:
        """Whether some steps read more than others by plan."""
        return False

    @abstractmethod
    def index_bytes(self, entries: int, head_dim: int) -> int:
        """Bytes held beside one head's entries to choose from them; without torch."""

    def compared_on_host(self, entries: int) -> int:
        """Keys that the host compares for one query head at a step, where a head lies there.

        0 unless overridden: the index is then on the device, and the device chooses.
        """
        return 0

    def scanned_bytes(self, entries: int, head_dim: int, key_bytes: int) -> int:
        """Bytes of one head that a step reads to choose; unless overridden, the whole index.

        Args:
            entries: held.
            head_dim: D.
            key_bytes: that the entries' keys take.
        """
        return self.index_bytes(entries, head_dim)


@dataclass(frozen=True)
class BlockReader(Reader):
    """Selects blocks of equal length; the last one is always read.

    Args:
        block: entries of a block.
        blocks: blocks read at a step, the last one included.
    """

    block: int
    blocks: int

    @abstractmethod
    def index(self, keys: Tensor, counts: Tensor) -> Tensor:
        """What is remembered of every block, ``[R, blocks of the longest row, ...]``.

        Args:
            keys: ``[R, n, D]`` as they are stored; of row r only the first ``counts[r]`` are real.
            counts: ``[R]`` int64.
        """

    @abstractmethod
    def score(self, index: Tensor, queries: Tensor) -> Tensor:
        """How much each block is worth to each query of a KV head, ``[R, C, blocks]``.

        Args:
            index: as ``index`` returned it.
            queries: of the head's group, ``[R, G, C, D]``.
        """

    def entries_read(self, entries: int) -> int:
        """Most entries that a step reads of a head that holds so many."""
        return min(entries, self.block * self.blocks)

    def select(self, index: Tensor, counts: Tensor, queries: Tensor) -> Tensor:
        """Numbers of the blocks to read, ``[R, C, k]`` int64; the row's last block comes last.

        A row with fewer than k blocks names its last one again.
        """
        import torch

        last = ((counts - 1).clamp_min(0) // self.block)[:, None, None]  # [R, 1, 1]
        worth = self.score(index, queries)
        number = torch.arange(worth.shape[-1], device=worth.device)
        worth = worth.masked_fill(number >= last, -torch.inf)
        wanted = min(self.blocks, worth.shape[-1])
        best = worth.topk(wanted - 1, -1) if wanted > 1 else None
        ends = last.expand(*worth.shape[:2], 1)
        if best is None:
            return ends
        chosen = torch.where(best.values == -torch.inf, ends, best.indices)
        return torch.cat([chosen, ends], -1)

    def reads(self, held: Held, queries: Tensor) -> Tensor:
        """The entries of the selected blocks."""
        return self._entries(held, queries, self.index(held.keys, held.counts))

    def follow(self, held: Held, query: Tensor, memory: Memory) -> Tensor:
        """The same by an index made once."""
        if not memory:
            memory["index"] = self.index(held.keys, held.counts)
        return self._entries(held, query, memory["index"])[:, -1]

    def _entries(self, held: Held, queries: Tensor, index: Tensor) -> Tensor:
        """Of the selected blocks, ``[R, C, n]`` bool."""
        import torch

        entries = held.keys.shape[1]
        blocks = -(-entries // self.block)
        chosen = self.select(index, held.counts, queries)
        flags = torch.zeros(*chosen.shape[:2], blocks, dtype=torch.bool, device=chosen.device)
        flags.scatter_(-1, chosen, value=True)
        return flags.repeat_interleave(self.block, -1)[..., :entries]


def dot_products(queries: Tensor, index: Tensor) -> Tensor:
    """Float32 products of queries ``[R, G, C, E]`` and an index ``[R, b, E]``: ``[R, G, C, b]``.

    An index in 16 bits on a GPU is multiplied as it is, so that a step reads no more than it holds.
    """
    import torch

    flat = queries.flatten(1, 2)
    if index.is_cuda and index.dtype == torch.bfloat16:
        found = torch.bmm(flat.to(index.dtype), index.transpose(1, 2), out_dtype=torch.float32)
    else:
        found = flat.float() @ index.transpose(1, 2).float()
    products: Tensor = found.unflatten(1, queries.shape[1:3])
    return products
