"""What a decode step reads of what a KV head holds: the contract of a reader.

A reader drops nothing. It divides a head's entries, in the order in which they are stored, into
blocks of equal length, keeps an index of them, and names for every query the blocks to attend to.
The last block and every generated token are always read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reader(ABC):
    """Selects blocks of a head's entries, query by query.

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

    @abstractmethod
    def index_bytes(self, entries: int, head_dim: int) -> int:
        """Bytes of the index of one head, all of which every step reads; without torch."""

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

    def reads(self, keys: Tensor, counts: Tensor, queries: Tensor) -> Tensor:
        """Which entries each query attends to, ``[R, C, n]`` bool."""
        import torch

        entries = keys.shape[1]
        blocks = -(-entries // self.block)
        chosen = self.select(self.index(keys, counts), counts, queries)
        flags = torch.zeros(*chosen.shape[:2], blocks, dtype=torch.bool, device=keys.device)
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
