"""What llama.cpp prints of its memory on one GPU, and the longest context that it fits there.

Every layer is taken to be on the GPU. llama.cpp fits its context to what is free less a margin of
1 GiB, in steps of 256 tokens; the same is done here.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, exact
from kvtune.common.units import MIB
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.llama_graph import graph_buffer, padded_cells
from kvtune.simulator.memory.peak import add
from kvtune.simulator.memory.weights import WeightFormat, weight_bytes

STEP = 256
MARGIN_BYTES = 1024 * MIB  # that llama.cpp leaves free where it chooses the context itself
_CONTEXT = Estimate(400 * MIB, 250 * MIB, 750 * MIB, "B", "assumed")
"""Of a CUDA process beside its buffers. llama.cpp's own breakdown calls it unaccounted: 749 MiB on
an RTX PRO 6000 (github.com/ggml-org/llama.cpp/issues/27953)."""
CACHE_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip
# Builds before the first compute all of a micro-batch's logits when they reserve, later than the
# second one row a slot: github.com/ggml-org/llama.cpp/pull/23861, opened at build 9400 or so.
_ALL_ROWS, _SLOT_ROWS = 9272, 9600
NEWEST = "b10867"


@dataclass(frozen=True)
class LlamaFlags:
    """Flags of ``llama-server`` that decide what it allocates; None for what the server chooses.

    Args:
        ctx_size: tokens of all slots together.
        ubatch: tokens of a micro-batch.
        flash: whether flash attention is on.
        key_type: of cached keys, as ``--cache-type-k`` has it.
        value_type: of cached values.
        slots: requests at once.
        unified: whether the slots share one cache, so that each may fill all of it.
        swa_full: whether layers with a window keep the whole context.
    """

    ctx_size: int | None = None
    ubatch: int = 512
    flash: bool = True
    key_type: str = "f16"
    value_type: str = "f16"
    slots: int = 1
    unified: bool = False
    swa_full: bool = False


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
        host_compute: the same of the host.
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
    flags: LlamaFlags = LlamaFlags(),
    version: str = NEWEST,
    limit_bytes: int | None = None,
) -> LlamaMemory:
    """What ``llama-server`` would print with all layers on the card.

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
    fixed = add(_on_device(shape, weight_format), _CONTEXT)
    fits = _fitting(shape, flags, build, fixed, limit)
    ctx = flags.ctx_size or max(STEP, int(fits.value))
    device, host = _compute(shape, flags, build, ctx)
    return LlamaMemory(
        version, gpu.visible_bytes, limit, padded_cells(ctx), _on_device(shape, weight_format),
        _cache(shape, flags, ctx), device, host, _CONTEXT, fits,
    )  # fmt: skip


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


def _on_device(shape: ModelShape, weight_format: WeightFormat) -> Estimate:
    """All weights but embeddings, which stay on the host; one that is tied is there twice."""
    whole, counts = weight_bytes(shape, weight_format), shape.parameter_counts()
    output = shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0
    on_host = max(0, counts.embedding - output)
    if not on_host:
        return whole
    share = on_host / (counts.embedding + counts.head + counts.matrices)
    stays = share * whole.value if weight_format != "bf16" else 2.0 * on_host
    return Estimate(
        whole.value - stays, whole.low - 1.1 * stays, whole.high - 0.6 * stays, "B", "assumed"
    )


def _cache(shape: ModelShape, flags: LlamaFlags, ctx: int) -> Estimate:
    """Keys and values of all cells, and recurrent states of all slots."""
    keys, values = CACHE_BYTES[flags.key_type], CACHE_BYTES[flags.value_type]
    size = 0.0
    for layer in shape.layer_caches:
        cells = _cells(flags, ctx, layer.window)
        held = layer.key_dim * keys + layer.value_dim * values
        size += cells * layer.kv_heads * held + flags.slots * layer.state_bytes
    hybrid = any(layer.state_bytes for layer in shape.layer_caches)
    if not hybrid:
        return exact(int(size), "B")
    return Estimate(
        size, 0.95 * size, 1.1 * size, "B", "assumed"
    )  # states in float32, or in 16 bits


def _cells(flags: LlamaFlags, ctx: int, window: int | None) -> int:
    """Of one layer's cache, over all slots; a window keeps what a micro-batch adds to it."""
    cells = padded_cells(ctx)
    if window is None or flags.swa_full:
        return cells
    slots = 1 if flags.unified else flags.slots
    return min(cells, slots * padded_cells(window + flags.ubatch))


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
    shape: ModelShape, flags: LlamaFlags, build: int, fixed: Estimate, limit: int
) -> Estimate:
    """Tokens of the longest context whose buffers fit, up to the model's own length."""
    steps = range(STEP, padded_cells(shape.max_context) + 1, STEP)

    def needed(tokens: int, end: str) -> int:
        one = replace(flags, ctx_size=tokens)
        parts = fixed, _cache(shape, one, tokens), _compute(shape, one, build, tokens)[0]
        return math.ceil(sum(float(getattr(part, end)) for part in parts)) + MARGIN_BYTES

    def longest(end: str) -> float:
        return float(STEP * bisect_right(steps, limit, key=lambda tokens: needed(tokens, end)))

    return Estimate(longest("value"), longest("high"), longest("low"), "tokens", "fitted")
