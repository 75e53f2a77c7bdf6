"""llama.cpp's caches: cells of keys and values, and recurrent states, of the GPU and the host."""

from __future__ import annotations

from kvtune.common.estimate import Estimate, exact
from kvtune.profiles.layer_cache import LayerCache
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.llama_flags import CACHE_BYTES, LlamaFlags
from kvtune.simulator.memory.llama_graph import padded_cells
from kvtune.simulator.memory.llama_offload import Offload


def cache_buffers(
    shape: ModelShape, flags: LlamaFlags, ctx: int, offload: Offload
) -> tuple[Estimate, Estimate]:
    """Keys and values of all cells, and recurrent states of all slots, on the GPU and the host."""
    keys, values = CACHE_BYTES[flags.key_type], CACHE_BYTES[flags.value_type]
    sizes = {True: 0.0, False: 0.0}
    states = dict(sizes)
    for number, layer in enumerate(shape.layer_caches):
        cells = cells_of(flags, ctx, layer.window)
        held = layer.key_dim * keys + layer.value_dim * values
        there = offload.holds_cache(number)
        sizes[there] += cells * layer.kv_heads * held
        states[there] += flags.slots * _state_bytes(layer)
    return _cache_estimate(sizes[True], states[True]), _cache_estimate(sizes[False], states[False])


def _state_bytes(layer: LayerCache) -> float:
    """A layer's state in 32 bits, with one input of a convolution fewer than it spans."""
    if not layer.conv_channels:
        return layer.state_bytes
    return 4.0 * (layer.conv_channels * (layer.conv_width - 1) + layer.recurrent_elements)


def _cache_estimate(entries: float, states: float) -> Estimate:
    if not states:
        return exact(int(entries), "B")
    size = entries + states  # some builds keep states in 16 bits, or more than one of a slot
    return Estimate(size, entries + 0.5 * states, entries + 1.1 * states, "B", "assumed")


def cells_of(flags: LlamaFlags, ctx: int, window: int | None) -> int:
    """Of one layer's cache, over all slots; a window keeps what a micro-batch adds to it."""
    cells = padded_cells(ctx)
    if window is None or flags.swa_full:
        return cells
    slots = 1 if flags.unified else flags.slots
    return min(cells, slots * padded_cells(window + flags.ubatch))
