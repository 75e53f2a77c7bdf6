"""Quest: everything is held; a step reads the blocks whose keys may score highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ReadingMethod
from kvtune.policies.reader import BlockReader, dot_products
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_BOUND_BYTES = 4  # a 16-bit minimum and maximum a channel


@dataclass(frozen=True)
class Quest(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads.

    index[b]  = smallest and largest key of block b, channel by channel
    bound[b]  = max over the head's group of sum_c max(q_c * largest_c, q_c * smallest_c)
    read      = the blocks of highest bound, and always the last one

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    ICML 2024, arXiv 2406.10774; blocks of 16 are the authors'. Differs: one selection a KV head,
    not a query head; the authors leave the first two layers dense, which a policy says by giving
    those layers another option. The paged runtime reads blocks of whole pages (``block: 64``).
    Cost: O(G D P / b) a step for the bounds; holds P / b bounds of D channels.
    """

    name = "quest"
    source = "Tang et al., ICML 2024, arXiv 2406.10774"

    block: int = parameter(16, "tokens of a block", unit="tokens", low=1, high=4096)

    def reader(self, budget: int) -> BlockReader:
        """Bounds of blocks; one block at least is read."""
        return BlockBounds(self.block, max(budget // self.block, 1))


@dataclass(frozen=True)
class BlockBounds(BlockReader):
    """Ranks blocks by an upper bound on the logits of their keys."""

    def index(self, keys: Tensor, counts: Tensor) -> Tensor:
        """Largest and smallest key by channel, one behind the other, ``[R, blocks, 2 D]``.

        Of blocks without an entry, which no row selects, zeros.
        """
        import torch
        import torch.nn.functional as F

        real = torch.arange(keys.shape[1], device=keys.device) < counts[:, None]
        missing = -keys.shape[1] % self.block

        def blocks(fill: float) -> Tensor:
            filled = keys.masked_fill(~real[..., None], fill)
            wide: Tensor = F.pad(filled, (0, 0, 0, missing), value=fill)
            split: Tensor = wide.unflatten(1, (-1, self.block))
            return split

        bounds = torch.cat([blocks(-torch.inf).amax(2), blocks(torch.inf).amin(2)], -1)
        return bounds.masked_fill(bounds.isinf(), 0)

    def score(self, index: Tensor, queries: Tensor) -> Tensor:
        """The bound of each block under each query, the highest of the head's group."""
        import torch

        signs = torch.cat([queries.clamp_min(0), queries.clamp_max(0)], -1)  # [R, G, C, 2 D]
        highest: Tensor = dot_products(signs, index).amax(1)
        return highest

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """Two 16-bit numbers a channel and block."""
        return -(-entries // self.block) * head_dim * _BOUND_BYTES
