"""How vLLM cuts its cache into blocks, and how many tokens it then says fit.

Layers of one kind (whole contexts, one window, or a recurrent state) are dealt into groups of as
many layers, and a block holds the same few tokens of all layers of a group, or their states. All
groups draw blocks of one size from one pool, so a recurrent layer's state decides how many tokens
an attention block holds: as many as make it no smaller, in steps of what the kernels read at once.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.profiles.layer_cache import LayerCache
from kvtune.profiles.shape import ModelShape

_KERNEL_STEP = 16  # tokens that attention kernels read at once


@dataclass(frozen=True)
class BlockGroup:
    """Layers that share a block table.

    Args:
        block_size: tokens of a block; those of attention for recurrent layers too.
        window: tokens that are kept; None for whole contexts.
        state_blocks: blocks of a request, whatever its length, in recurrent layers; None in others.
    """

    block_size: int
    window: int | None = None
    state_blocks: int | None = None

    def blocks(self, longest: int, step: int) -> int:
        """Blocks that a request of the longest length holds in each layer."""
        if self.state_blocks is not None:
            return self.state_blocks
        if self.window is None:
            return math.ceil(longest / self.block_size)
        # A window may begin anywhere in its first block.
        return math.ceil(min(self.window - 1 + step, longest) / self.block_size) + 1


@dataclass(frozen=True)
class CacheBlocks:
    """The blocks of a model's cache on one GPU.

    Args:
        block_bytes: of a block, over the layers of its group.
        groups: of layers, which draw from one pool of blocks.
    """

    block_bytes: float
    groups: tuple[BlockGroup, ...]

    @property
    def block_size(self) -> int:
        """Tokens of the shortest block."""
        return min(group.block_size for group in self.groups)

    def tokens_of_blocks(self, cache_bytes: float) -> int:
        """Tokens where each group has its share of the blocks, whatever its window."""
        return self._blocks(cache_bytes) // len(self.groups) * self.block_size

    def tokens_of_requests(self, cache_bytes: float, longest: int, step: int) -> int:
        """Tokens of all requests of the longest length that fit at once.

        Args:
            cache_bytes: of all blocks.
            longest: tokens of each request.
            step: tokens that a step may add before a window lets go of others.
        """
        needed = sum(group.blocks(longest, step) for group in self.groups)
        return int(self._blocks(cache_bytes) / needed * longest)

    def _blocks(self, cache_bytes: float) -> int:
        return int(cache_bytes // self.block_bytes)


@dataclass(frozen=True)
class BlockRules:
    """What releases and flags of vLLM decide of the blocks.

    Args:
        block_size: tokens of a block as asked for; recurrent layers may need more.
        element_bytes: of a cached number.
        state_blocks: of a request in each recurrent layer: 1, or 2 where its states are kept for
            other requests with the same beginning.
        state_element_bytes: of a number of the recurrent state; None for what the model asks for.
        latent_step: tokens that kernels of latent attention read at once beside recurrent layers.
        padded_below: groups are as large as the commonest kind of layer where that is fewer than so
            many times the rarest, else as large as the rarest.
    """

    block_size: int = 16
    element_bytes: float = 2.0
    state_blocks: int = 1
    state_element_bytes: int | None = None
    latent_step: int = 128
    padded_below: float = 1.5


def cache_blocks(local: ModelShape, rules: BlockRules) -> CacheBlocks:
    """The blocks of one GPU's share of a model.

    Raises:
        KvtuneError: layers whose blocks are not modelled: index keys or compressed entries, widths
            that are no multiple of each other, or states whose parts are not known.
    """
    if any(layer.index_dim or layer.compress_rate for layer in local.layer_caches):
        raise _not_modelled(local, "index keys or compressed entries")
    kinds = Counter(
        LayerCache(layer.kv_heads, layer.key_dim, layer.value_dim, layer.window)
        for layer in local.layer_caches
        if layer.elements_per_token
    )
    if not kinds:
        raise _not_modelled(local, "no keys and values")
    states = Counter(_state_page(local, layer, rules) for layer in local.layer_caches)
    del states[0]
    size = _block_size(local, kinds, max(states, default=0), rules)
    if not states and len({layer.window for layer in kinds}) == 1:
        return _one_group(kinds, size, rules)
    return _pooled(local, kinds, sum(states.values()), size, rules)


def _state_page(local: ModelShape, layer: LayerCache, rules: BlockRules) -> int:
    """Bytes of a layer's state: vLLM keeps one input fewer than a convolution spans."""
    if not layer.state_bytes:
        return 0
    if not layer.conv_channels:
        raise _not_modelled(local, "recurrent states whose parts are not known")
    inputs = 2 * layer.conv_channels * (layer.conv_width - 1)
    element = rules.state_element_bytes or layer.recurrent_bytes
    return inputs + element * layer.recurrent_elements


def _block_size(
    local: ModelShape, kinds: Counter[LayerCache], state: int, rules: BlockRules
) -> int:
    """Tokens of a block of the widest layers, so that it is no smaller than a state."""
    if not state:
        return rules.block_size
    step = max(_KERNEL_STEP, rules.block_size)
    if local.latent is not None:
        step = max(step, rules.latent_step)
    widest = max(layer.elements_per_token for layer in kinds) * rules.element_bytes
    return max(rules.block_size, step * math.ceil(state / (step * widest)))


def _one_group(kinds: Counter[LayerCache], size: int, rules: BlockRules) -> CacheBlocks:
    """Attention of one window: a block holds the same tokens of every layer, wide or narrow."""
    numbers = sum(layer.elements_per_token * count for layer, count in kinds.items())
    group = BlockGroup(size, next(iter(kinds)).window)
    return CacheBlocks(size * numbers * rules.element_bytes, (group,))


def _pooled(
    local: ModelShape, kinds: Counter[LayerCache], states: int, size: int, rules: BlockRules
) -> CacheBlocks:
    """Several kinds: narrower layers have more tokens in a block, states are padded to its size."""
    widest = max(layer.elements_per_token for layer in kinds)
    group = _layers_of_a_group([*kinds.values(), *([states] if states else [])], rules)
    groups = []
    for layer, count in kinds.items():
        if widest % layer.elements_per_token:
            raise _not_modelled(local, "layers of widths that are no multiple of each other")
        tokens = size * (widest // layer.elements_per_token)
        groups += [BlockGroup(tokens, layer.window)] * math.ceil(count / group)
    groups += [BlockGroup(size, state_blocks=rules.state_blocks)] * math.ceil(states / group)
    return CacheBlocks(group * size * widest * rules.element_bytes, tuple(groups))


def _layers_of_a_group(counts: list[int], rules: BlockRules) -> int:
    fewest, most = min(counts), max(counts)
    return most if most < rules.padded_below * fewest else fewest


def _not_modelled(local: ModelShape, what: str) -> KvtuneError:
    return KvtuneError(f"{local.name} has {what}: how vLLM cuts its cache is not modelled")
