"""Decode steps and prefills of a serving stack, put together from its measured kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import split_over
from kvtune.simulator.latency.elsewhere import ExpertShape, Heads, ServingTables
from kvtune.simulator.latency.table_grid import FloatArray

# Norms, rotary, activations and copies pass over the residual stream about this often a layer.
_PASSES_A_LAYER = 14
_ACHIEVED = 0.7  # of the bandwidth, by such kernels


@dataclass(frozen=True)
class Overheads:
    """What the tables do not hold, fitted on whole serving runs (benchmarks/hardware_tables.py).

    Args:
        layer_s: kernels of a layer beside attention, matrices and sums, seconds.
        step_s: of the host and the sampler a step, seconds.
        sequence_s: of these a sequence, seconds.
    """

    layer_s: float
    step_s: float
    sequence_s: float


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
        attention = np.zeros(sequences.shape)
        for window, layers in self._layers_by_window():
            attention = attention + layers * self.tables.decode_attention(
                self._heads, window, self.kv_format, sequences, held
            )
        return self._whole(attention, sequences, sequences)

    def prefill(self, prompt: npt.ArrayLike, batch: npt.ArrayLike = 1) -> FloatArray:
        """Seconds of reading prompts of one length side by side."""
        tokens, prompts = (np.asarray(a, np.float64) for a in np.broadcast_arrays(prompt, batch))
        attention = np.zeros(tokens.shape)
        for window, layers in self._layers_by_window():
            attention = attention + layers * self.tables.context_attention(
                self._heads, window, self.kv_format, prompts, tokens
            )
        return self._whole(attention, tokens * prompts, prompts)

    def _whole(self, attention: FloatArray, rows: FloatArray, logits: FloatArray) -> FloatArray:
        """With the matrices, experts, sums over GPUs and overheads of so many rows."""
        shape, over = self.shape, self.overheads
        moved = 2.0 * rows * shape.hidden_size * _PASSES_A_LAYER
        layer = (
            self._attention_matrices(rows)
            + 2 * self.tables.all_reduce(self.gpus, rows * shape.hidden_size)
            + over.layer_s
            + moved / (_ACHIEVED * self.bandwidth_bytes_per_s)
        )
        head = self.tables.matrix(self._local.vocab_size, shape.hidden_size, "bfloat16", logits)
        step = over.step_s + over.sequence_s * logits
        return np.asarray(attention + shape.layers * layer + self._feed_forward(rows) + head + step)

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

    def _layers_by_window(self) -> list[tuple[int | None, int]]:
        windows = self.shape.windows
        return [(window, windows.count(window)) for window in dict.fromkeys(windows)]
