"""Decode steps and prefills of a serving stack, put together from its measured kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.elsewhere import ExpertShape, Heads, ServingTables
from kvtune.simulator.latency.table_grid import FloatArray

_Attention = Callable[[Heads, int | None, str, FloatArray, FloatArray], FloatArray]
"""Seconds of one layer, by heads, window, format of the cache, sequences and tokens."""

# Norms, rotary, activations and copies pass over the residual stream about this often a layer.
_PASSES_A_LAYER = 14
_ACHIEVED = 0.7  # of the bandwidth, by such kernels


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


def small_kernels(shape: ModelShape, matrix_format: str) -> int:
    """Kernels of a layer beside attention, matrices, experts and sums over GPUs.

    Norms, and one each for rotary positions, the cache and the activation; norms of queries and of
    keys; router, choice and order of experts; and what brings the input of each of four matrices
    into a format with a scale a block.
    """
    count = shape.norms_per_layer + 3 + 2 * shape.query_key_norm
    count += 3 * (shape.experts is not None)
    return count + 4 * (matrix_format in ("fp8_block", "nvfp4"))


@dataclass(frozen=True, eq=False)
class ServingModel:
    """One model on one or several GPUs of a system, served by one stack.

    Args:
        tables: of the system and the stack.
        shape: the whole model.
        gpus: that share each layer.
        matrix_format: of the tables: ``bfloat16``, ``fp8``, ``nvfp4``...
        expert_format: of the routed experts, likewise.
        kv_format: ``bfloat16`` or ``fp8``.
        bandwidth_bytes_per_s: of one GPU's memory.
        overheads: of the stack.
    """

    tables: ServingTables
    shape: ModelShape
    gpus: int
    matrix_format: str
    expert_format: str
    kv_format: str
    bandwidth_bytes_per_s: float
    overheads: Overheads

    def __post_init__(self) -> None:
        if self.shape.latent is not None:
            raise KvtuneError(
                f"{self.shape.name} has latent attention; its tables are not read yet"
            )

    def decode(self, batch: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
        """Seconds of a step of so many sequences with so many tokens in each one's cache."""
        sequences, held = (np.asarray(a, np.float64) for a in np.broadcast_arrays(batch, tokens))
        kernels = self.decode_attention(sequences, held) + self.passes(sequences)
        kernels = self.overheads.kernels * (kernels + self.logits(sequences))
        return np.asarray(kernels + self.rest(sequences))

    def prefill(self, prompt: npt.ArrayLike, batch: npt.ArrayLike = 1) -> FloatArray:
        """Seconds of reading prompts of one length side by side."""
        tokens, prompts = (np.asarray(a, np.float64) for a in np.broadcast_arrays(prompt, batch))
        kernels = self.context_attention(prompts, tokens) + self.passes(tokens * prompts)
        return self.reading_step(kernels, prompts)

    def reading_step(self, kernels: npt.ArrayLike, rows: npt.ArrayLike) -> FloatArray:
        """Seconds of a step that reads prompts.

        Args:
            kernels: seconds of its attention and passes, by the tables.
            rows: of which logits are asked.
        """
        over, asked = self.overheads, np.asarray(rows, np.float64)
        seconds = over.reading * np.asarray(kernels) + over.kernels * self.logits(asked)
        launches = self.shape.layers * over.launches_s
        return np.asarray(np.maximum(seconds + self.rest(asked), launches))

    def decode_attention(self, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        """Seconds of attention of all layers, for one new token of each sequence."""
        return self._attention(self.tables.decode_attention, batch, tokens)

    def context_attention(self, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        """Seconds of attention of all layers, over whole prompts."""
        return self._attention(self.tables.context_attention, batch, tokens)

    def _attention(self, kernel: _Attention, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        windows = self.shape.windows
        seconds = np.zeros(np.broadcast(batch, tokens).shape)
        for window in dict.fromkeys(windows):
            one = kernel(self._heads, window, self.kv_format, batch, tokens)
            seconds = seconds + windows.count(window) * one
        return seconds

    def passes(self, rows: FloatArray) -> FloatArray:
        """Seconds of all layers' matrices, experts and sums over GPUs, for so many new tokens."""
        shape = self.shape
        moved = 2.0 * rows * shape.hidden_size * _PASSES_A_LAYER
        layer = (
            self._attention_matrices(rows)
            + 2 * self.tables.all_reduce(self.gpus, rows * shape.hidden_size)
            + shape.norms_over_heads * self.tables.all_reduce(self.gpus, 2 * rows)
            + moved / (_ACHIEVED * self.bandwidth_bytes_per_s)
        )
        return np.asarray(shape.layers * layer + self._feed_forward(rows))

    def logits(self, rows: FloatArray) -> FloatArray:
        """Seconds of the output matrix, over so many tokens."""
        return self.tables.matrix(
            self._local.vocab_size, self.shape.hidden_size, "bfloat16", np.maximum(rows, 1)
        )

    def rest(self, sequences: FloatArray) -> FloatArray:
        """What a step takes beside the kernels of the tables."""
        over = self.overheads
        layer = small_kernels(self.shape, self.matrix_format) * over.small_kernel_s
        return np.asarray(self.shape.layers * layer + over.step_s + over.sequence_s * sequences)

    def _attention_matrices(self, rows: FloatArray) -> FloatArray:
        local = self._local
        queries, width = local.query_heads * local.head_dim, local.hidden_size
        projected = queries + 2 * local.kv_heads * local.head_dim
        form = self.matrix_format
        return np.asarray(
            self.tables.matrix(projected, width, form, rows)
            + self.tables.matrix(width, queries, form, rows)
        )

    def _feed_forward(self, rows: FloatArray) -> FloatArray:
        """Of all layers: dense blocks, routed experts and those that every token visits."""
        local, experts = self._local, self.shape.experts
        dense = self.shape.layers if experts is None else experts.dense_layers
        seconds = np.zeros(np.shape(rows))
        if dense:
            seconds = seconds + dense * self._dense(local.intermediate_size, rows)
        if experts is not None:
            routed = ExpertShape(
                self.shape.hidden_size, experts.intermediate_size, experts.active,
                experts.count, self.gpus,
            )  # fmt: skip
            layer = self.tables.experts(routed, self.expert_format, rows)
            if local.experts is not None and local.experts.shared_size:
                layer = layer + self._dense(local.experts.shared_size, rows)
            seconds = seconds + (self.shape.layers - dense) * layer
        return np.asarray(seconds)

    def _dense(self, intermediate: int, rows: FloatArray) -> FloatArray:
        width, form = self.shape.hidden_size, self.matrix_format
        return np.asarray(
            self.tables.matrix(2 * intermediate, width, form, rows)
            + self.tables.matrix(width, intermediate, form, rows)
        )

    @property
    def _local(self) -> ModelShape:
        return split_over(self.shape, self.gpus)

    @property
    def _heads(self) -> Heads:
        local = self._local
        return Heads(local.query_heads, local.kv_heads, local.head_dim)
