"""Blocks by their mean key: landmark attention without the landmarks that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ReadingMethod
from kvtune.policies.reader import BlockReader, dot_products
from kvtune.policies.registry import parameter

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER_BYTES = 2


@dataclass(frozen=True)
class Landmark(ReadingMethod):
    """Holds every token; the budget is how many of them a step reads. A training-free surrogate.

    landmark[b] = mean key of block b
    score[b]    = max over the head's group of q . landmark[b]
    read        = the blocks of highest score, and always the last one

    Source: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
    Transformers", NeurIPS 2023, arXiv 2305.16300; blocks of 50 are the authors'. Differs: the paper
    trains a landmark token that ends each block and whose attention weighs the block; here the mean
    key stands for it, and softmax is over all that is read. Nothing published of the trained method
    holds of this. The paged runtime reads blocks of whole pages (``block: 64``).
    Cost: O(G D P / b) a step; one key a block is held.
    """

    name = "landmark"
    source = "a surrogate of Mohtashami and Jaggi, NeurIPS 2023, arXiv 2305.16300"

    block: int = parameter(50, "tokens of a block", unit="tokens", low=1, high=4096)

    def reader(self, budget: int) -> BlockReader:
        """Mean keys of blocks; one block at least is read."""
        return MeanKeys(self.block, max(budget // self.block, 1))


@dataclass(frozen=True)
class MeanKeys(BlockReader):
    """Ranks blocks by the logit of their mean key."""

    def index(self, keys: Tensor, counts: Tensor) -> Tensor:
        """Mean key of each block, ``[R, blocks, D]``; of blocks without an entry, zeros."""
        import torch
        import torch.nn.functional as F

        real = torch.arange(keys.shape[1], device=keys.device) < counts[:, None]
        missing = -keys.shape[1] % self.block
        kept = F.pad(keys.masked_fill(~real[..., None], 0), (0, 0, 0, missing))
        total = kept.unflatten(1, (-1, self.block)).sum(2)
        number = F.pad(real, (0, missing)).unflatten(1, (-1, self.block)).sum(2)
        mean: Tensor = total / number.clamp_min(1)[..., None].to(total.dtype)
        return mean

    def score(self, index: Tensor, queries: Tensor) -> Tensor:
        """The highest logit of the head's group."""
        return dot_products(queries, index).amax(1)

    def index_bytes(self, entries: int, head_dim: int) -> int:
        """One key in 16 bits a block."""
        return -(-entries // self.block) * head_dim * _NUMBER_BYTES
