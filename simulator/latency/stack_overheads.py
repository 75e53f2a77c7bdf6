"""What serving stacks take beside the kernels that their tables have."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.profiles.shape import ModelShape


@dataclass(frozen=True)
class Overheads:
    """What the tables do not hold, fitted on whole serving runs (benchmarks/hardware_runs.py).

    Args:
        small_kernel_s: seconds of each kernel of a layer that no table has
            (:func:`small_kernels`).
        step_s: seconds of the host and the sampler a step.
        sequence_s: seconds of these a sequence.
        kernels: how many times as long as in the tables a decode step's kernels take.
        reading: likewise where prompts are read.
        launches_s: seconds of the host's launches a layer where prompts are read, which no graph
            holds: a step takes no less, however fast its kernels are.
    """

    small_kernel_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    kernels: float = 1.0
    reading: float = 1.0
    launches_s: float = 0.0


def small_kernels(shape: ModelShape, matrix_format: str, whole_attention: bool = False) -> int:
    """Kernels of a layer beside attention, matrices, experts and sums over GPUs.

    Norms, and one each for rotary positions, the cache and the activation; norms of queries and of
    keys, or of their latents; router, choice and order of experts; and what brings the input of
    each of four matrices into a format with a scale a block. Where a table has attention with all
    that belongs to it (``whole_attention``), only what stands outside of it.
    """
    scaled = matrix_format in ("fp8_block", "nvfp4")
    outside = shape.norms_per_layer + 1 + 3 * (shape.experts is not None) + 2 * scaled
    if whole_attention:
        return outside
    normed = shape.query_key_norm or shape.latent is not None
    return outside + 2 + 2 * normed + 2 * scaled
