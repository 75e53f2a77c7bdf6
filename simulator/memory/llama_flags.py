"""Flags of ``llama-server`` that decide what it allocates."""

from __future__ import annotations

from dataclasses import dataclass

CACHE_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip
"""Bytes of a cached number, by the type that ``--cache-type-k`` and ``-v`` name."""


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
        gpu_layers: layers on the GPU, the output matrix counted as one; None for all.
        cache_on_gpu: whether the cache of layers on the GPU is there too.
    """

    ctx_size: int | None = None
    ubatch: int = 512
    flash: bool = True
    key_type: str = "f16"
    value_type: str = "f16"
    slots: int = 1
    unified: bool = False
    swa_full: bool = False
    gpu_layers: int | None = None
    cache_on_gpu: bool = True


DEFAULTS = LlamaFlags()
