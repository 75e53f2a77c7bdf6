"""How vLLM cuts its cache into blocks, and how many tokens it then says fit.

Layers of one kind (whole contexts, or one window) are dealt into groups of as many layers, and a
block holds the same few tokens of all layers of a group. A model of one kind has one group.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import LayerCache, ModelShape


@dataclass(frozen=True)
class CacheBlocks:
    """The blocks of a model's cache on one GPU.

    Args:
        block_bytes: of a block, over the layers of its group.
        block_size: tokens of a block.
        windows: of each group; None for whole contexts.
    """

    block_bytes: float
    block_size: int
    windows: tuple[int | None, ...]

    def tokens_of_blocks(self, cache_bytes: float) -> int:
        """Tokens where each group has its share of the blocks, whatever its window."""
        return self._blocks(cache_bytes) // len(self.windows) * self.block_size

    def tokens_of_requests(self, cache_bytes: float, longest: int, step: int) -> int:
        """Tokens of all requests of the longest length that fit at once.

        Args:
            cache_bytes: of all blocks.
            longest: tokens of each request.
            step: tokens that a step may add before a window lets go of others.
        """
        needed = sum(self._needed(window, longest, step) for window in self.windows)
        return int(self._blocks(cache_bytes) / needed * longest)

    def _blocks(self, cache_bytes: float) -> int:
        return int(cache_bytes // self.block_bytes)

    def _needed(self, window: int | None, longest: int, step: int) -> int:
        if window is None:
            return math.ceil(longest / self.block_size)
        # A window may begin anywhere in its first block.
        return math.ceil(min(window - 1 + step, longest) / self.block_size) + 1


def cache_blocks(local: ModelShape, block_size: int, element_bytes: float) -> CacheBlocks:
    """The blocks of one GPU's share of a model.

    Raises:
        KvtuneError: layers with recurrent states, or of several widths, whose blocks vLLM pads.
    """
    kinds = Counter(layer for layer in local.layer_caches if layer.elements_per_token)
    if any(layer.state_bytes for layer in local.layer_caches):
        raise _not_modelled(local, "layers with recurrent states")
    if not kinds:
        raise _not_modelled(local, "no keys and values")
    if len({layer.elements_per_token for layer in kinds}) > 1:
        raise _not_modelled(local, "layers of several widths")
    group = _layers_of_a_group(kinds)
    windows = [
        layer.window for layer, number in kinds.items() for _ in range(math.ceil(number / group))
    ]
    width = next(iter(kinds)).elements_per_token
    return CacheBlocks(group * block_size * width * element_bytes, block_size, tuple(windows))


def _layers_of_a_group(kinds: Counter[LayerCache]) -> int:
    """Layers of a group: those of the rarest kind, or of the commonest if that pads under 25 %."""
    fewest, most = min(kinds.values()), max(kinds.values())
    return most if most < 1.25 * fewest else fewest


def _not_modelled(local: ModelShape, what: str) -> KvtuneError:
    return KvtuneError(f"{local.name} has {what}: how vLLM cuts its cache is not modelled")
