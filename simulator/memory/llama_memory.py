"""What llama.cpp prints of its memory on one GPU, and the longest context that it fits there.

Layers are on the GPU as far as ``-ngl`` says (``llama_offload``), all where it does not. llama.cpp
fits its context to what is free less a margin of 1 GiB, in steps of 256 tokens; the same is done
here.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.llama_cache import cache_buffers
from kvtune.simulator.memory.llama_flags import CACHE_BYTES, DEFAULTS, LlamaFlags
from kvtune.simulator.memory.llama_graph import graph_buffer, padded_cells
from kvtune.simulator.memory.llama_offload import (
    Offload,
    layer_bytes,
    offload_of,
    split_weights,
)
from kvtune.simulator.memory.peak import add
from kvtune.simulator.memory.weights import WeightFormat

STEP = 256
MARGIN_BYTES = 1024 * MIB  # that llama.cpp leaves free where it chooses the context itself
_CONTEXT = Estimate(400 * MIB, 250 * MIB, 750 * MIB, "B", "assumed")
"""Of a CUDA process beside its buffers. llama.cpp's own breakdown calls it unaccounted: 749 MiB on
an RTX PRO 6000 (github.com/ggml-org/llama.cpp/issues/27953)."""
# Builds before the first compute all of a micro-batch's logits when they reserve, later than the
# second one row a slot: github.com/ggml-org/llama.cpp/pull/23861, opened at build 9400 or so.
_ALL_ROWS, _SLOT_ROWS = 9272, 9600
NEWEST = "b10867"


@dataclass(frozen=True)
class LlamaMemory:
    """Buffers as llama.cpp's log names them. Estimates are in bytes, but for the tokens.

    Args:
        version: the build.
        device_bytes: what the card shows.
        limit_bytes: that may be used of it.
        ctx_size: tokens of the context that the buffers are of.
        weights: "model buffer size" of the GPU.
        cache: "KV buffer size", and "RS buffer size" of recurrent layers.
        compute: "compute buffer size" of the GPU.
        host_weights: "model buffer size" of the host.
        host_cache: the caches that are kept there.
        host_compute: "compute buffer size" of the host.
        process: of the driver and libraries.
        tokens: the longest context that fits with llama.cpp's margin.
    """

    version: str
    device_bytes: int
    limit_bytes: int
    ctx_size: int
    weights: Estimate
    cache: Estimate
    compute: Estimate
    host_weights: Estimate
    host_cache: Estimate
    host_compute: Estimate
    process: Estimate
    tokens: Estimate

    @property
    def total(self) -> Estimate:
        """All that is taken of the GPU."""
        return add(self.weights, self.cache, self.compute, self.process)


def llama_memory(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    flags: LlamaFlags = DEFAULTS,
    version: str = NEWEST,
    limit_bytes: int | None = None,
) -> LlamaMemory:
    """What ``llama-server`` would print.

    Raises:
        KvtuneError: a build that is none, values in few bits without flash attention, or layers
            whose cache llama.cpp lays out in ways that are not modelled.
    """
    build = read_build(version)
    if not flags.flash and flags.value_type not in ("f32", "f16", "bf16"):
        raise KvtuneError(
            f"llama.cpp keeps values in {flags.value_type} with flash attention only",
            hint="leave out --flash-attn off, or --cache-type-v.",
        )
    if shape.latent or any(x.compress_rate or x.index_dim for x in shape.layer_caches):
        raise KvtuneError(
            f"{shape.name} caches latents or compressed entries: what llama.cpp computes for them "
            "is not modelled"
        )
    limit = gpu.visible_bytes if limit_bytes is None else min(limit_bytes, gpu.visible_bytes)
    offload = offload_of(shape.layers, flags.gpu_layers, flags.cache_on_gpu, build)
    weights, host_weights = split_weights(shape, weight_format, offload)
    copied = layer_bytes(shape, weight_format)
    parts = partial(_parts, shape, flags, build, offload, copied)
    fits = _fitting(shape, parts, add(weights, _CONTEXT), limit)
    ctx = flags.ctx_size or max(STEP, int(fits.value))
    cache, host_cache, device, host = parts(ctx)
    return LlamaMemory(
        version, gpu.visible_bytes, limit, padded_cells(ctx), weights, cache, device,
        host_weights, host_cache, host, _CONTEXT, fits,
    )  # fmt: skip


def _parts(
    shape: ModelShape, flags: LlamaFlags, build: int, offload: Offload, copied: float, ctx: int
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Cache on the GPU and on the host, then the compute buffers of both."""
    compute = _compute(shape, flags, build, ctx)
    if not offload.whole:
        compute = _partly(shape, flags, offload, copied, *compute)
    return (*cache_buffers(shape, flags, ctx, offload), *compute)


def _partly(
    shape: ModelShape,
    flags: LlamaFlags,
    offload: Offload,
    copied: float,
    device: Estimate,
    host: Estimate,
) -> tuple[Estimate, Estimate]:
    """Compute buffers where layers are on the host.

    Prompts are computed on the GPU all the same, with the weights of a host's layer copied over:
    two logs had a half and a whole layer's beside the buffer. What the host computes itself may be
    as much as the GPU would.
    """
    hidden = 4.0 * flags.ubatch * shape.hidden_size
    more = copied if offload.first else 0.0
    part = Estimate(
        device.value + 0.75 * more, 0.5 * device.low if offload.first else device.low,
        device.high + 1.25 * more, "B", "assumed",
    )  # fmt: skip
    return part, Estimate(host.value + hidden, host.low, host.high + device.high, "B", "assumed")


def read_build(version: str) -> int:
    """The number of a build such as ``b10809``.

    Raises:
        KvtuneError: it is none.
    """
    match = re.fullmatch(r"b?(\d{3,6})", version.strip())
    if match is None:
        raise KvtuneError(
            f"{version[:20]!r} is no build of llama.cpp", hint=f"write for example {NEWEST}."
        )
    return int(match[1])


def _compute(
    shape: ModelShape, flags: LlamaFlags, build: int, ctx: int
) -> tuple[Estimate, Estimate]:
    """The buffer on the GPU, and the host's.

    Between the two builds either number of rows may be right. A cache in few bits is widened for
    one layer at a time where the kernel does not read it as it is. With recurrent layers, or scores
    that are kept, the widest moment may be another by as much as two hidden states.
    """
    slot = ctx if flags.unified else max(1, ctx // flags.slots)
    windows = [layer.window for layer in shape.layer_caches if layer.window is not None]
    swa = min(padded_cells(slot), padded_cells(max(windows) + flags.ubatch)) if windows else None
    buffer = partial(graph_buffer, shape, padded_cells(slot), flags.ubatch, flags.flash)
    rows = flags.ubatch if build < _ALL_ROWS else flags.slots
    most = rows if build >= _SLOT_ROWS else flags.ubatch
    found, widest = buffer(rows, swa), buffer(most, swa)
    low = min(found.device, buffer(flags.slots, swa).device) if build < _SLOT_ROWS else found.device
    hidden = 4.0 * flags.ubatch * shape.hidden_size
    spare = 3 * hidden if _is_hybrid(shape) or not flags.flash or most > flags.slots else 0.0
    widened = _widened(shape, flags, ctx)
    device = Estimate(
        found.device + widened, low if build >= _ALL_ROWS else found.device,
        widest.device + spare + widened, "B", "fitted",
    )  # fmt: skip
    return device, Estimate(found.host, 0.9 * found.host, 1.1 * found.host + hidden, "B", "fitted")


def _is_hybrid(shape: ModelShape) -> bool:
    return any(layer.state_bytes for layer in shape.layer_caches)


def _widened(shape: ModelShape, flags: LlamaFlags, ctx: int) -> float:
    """Keys and values of one layer in 16 bits, where they are cached in fewer."""
    widest = max(layer.kv_heads * layer.key_dim for layer in shape.layer_caches)
    values = max(layer.kv_heads * layer.value_dim for layer in shape.layer_caches)
    sides = (flags.key_type, widest), (flags.value_type, values)
    return sum(2.0 * width * ctx for kind, width in sides if CACHE_BYTES[kind] < 2)


def _fitting(
    shape: ModelShape,
    parts: Callable[[int], tuple[Estimate, ...]],
    fixed: Estimate,
    limit: int,
) -> Estimate:
    """Tokens of the longest context whose buffers fit, up to the model's own length."""
    steps = range(STEP, padded_cells(shape.max_context) + 1, STEP)

    def needed(tokens: int, end: str) -> int:
        cache, _, compute, _ = parts(tokens)
        used = sum(float(getattr(part, end)) for part in (fixed, cache, compute))
        return math.ceil(used) + MARGIN_BYTES

    def longest(end: str) -> float:
        return float(STEP * bisect_right(steps, limit, key=lambda tokens: needed(tokens, end)))

    return Estimate(longest("value"), longest("high"), longest("low"), "tokens", "fitted")
