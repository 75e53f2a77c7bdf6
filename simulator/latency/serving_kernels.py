"""Decode steps and prefills of a serving stack, put together from its measured kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.layer_cache import LatentAttention
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.split import check_dealt, split_over
from kvtune.profiles.stack_kernels.attention import Heads, Kind
from kvtune.profiles.stack_kernels.experts import ExpertShape
from kvtune.profiles.stack_kernels.grid import FloatArray
from kvtune.profiles.stack_kernels.latent import LatentCall, check_latent, has_kernels
from kvtune.profiles.stack_kernels.tables import ServingTables
from kvtune.simulator.latency.stack_overheads import Overheads, small_kernels

# Norms, rotary, activations and copies pass over the residual stream about this often a layer.
_PASSES_A_LAYER = 14
_ACHIEVED = 0.7  # of the bandwidth, by such kernels

_LATENT_MATRICES = {"fp8": "fp8_block", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
"""Formats of projections that whole layers of latent attention were measured in, else 16 bits."""


def check_layers(shape: ModelShape) -> None:
    """Refuse layers that no stack's tables are read for.

    Raises:
        KvtuneError: recurrent states, index keys or compressed entries.
    """
    if any(each.state_bytes or each.index_dim or each.compress_rate for each in shape.cache):
        raise KvtuneError(
            f"{shape.name} has layers that the stacks' tables are not read for: recurrent states, "
            "index keys or compressed entries",
            hint="without --stack kvtune's own model answers.",
        )


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
        expert_parallel: groups of GPUs that have routed experts of their own; with 1, each GPU has
            a share of every expert.

    Raises:
        KvtuneError: attention that was not measured, or experts that cannot be dealt so.
    """

    tables: ServingTables
    shape: ModelShape
    gpus: int
    matrix_format: str
    expert_format: str
    kv_format: str
    bandwidth_bytes_per_s: float
    overheads: Overheads
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        check_latent(self.tables, self.shape)
        check_layers(self.shape)
        check_dealt(self.shape, self.gpus, self.expert_parallel)

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

    def prefill_in_chunks(self, tokens: int, prefix: int = 0, chunk: int | None = None) -> float:
        """Seconds of reading one prompt chunk after chunk, each attending to all before it.

        Args:
            tokens: of the prompt that are read.
            prefix: tokens before them that are held.
            chunk: tokens of a step; all of them unless given.
        """
        end = prefix + tokens
        begins = np.arange(prefix, end, chunk or tokens, dtype=np.float64)
        ends, one = np.append(begins[1:], float(end)), np.ones(len(begins))
        before = np.where(begins > 0, self.context_attention(one, np.maximum(begins, 1.0)), 0.0)
        kernels = self.context_attention(one, ends) - before + self.passes(ends - begins)
        return float(np.sum(self.reading_step(kernels, one)))

    def decode_attention(self, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        """Seconds of attention of all layers, for one new token of each sequence."""
        return self._attention("generation", batch, tokens)

    def context_attention(self, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        """Seconds of attention of all layers, over whole prompts."""
        return self._attention("context", batch, tokens)

    def _attention(self, kind: Kind, batch: FloatArray, tokens: FloatArray) -> FloatArray:
        if self.shape.latent is not None:
            projections = _LATENT_MATRICES.get(self.matrix_format, "bfloat16")
            call = LatentCall(
                kind, self._local.query_heads, self.kv_format,
                projections if self._whole_attention else None,
            )  # fmt: skip
            return self.shape.layers * self.tables.latent_attention(call, batch, tokens)
        decodes = kind == "generation"
        kernel = self.tables.decode_attention if decodes else self.tables.context_attention
        windows = self.shape.windows
        seconds = np.zeros(np.broadcast(batch, tokens).shape)
        for window in dict.fromkeys(windows):
            one = kernel(self._heads, window, self.kv_format, batch, tokens)
            seconds = seconds + windows.count(window) * one
        return seconds

    @property
    def _whole_attention(self) -> bool:
        """Whether the tables have latent attention with its projections alone."""
        return self.shape.latent is not None and not has_kernels(self.tables)

    def passes(self, rows: FloatArray) -> FloatArray:
        """Seconds of all layers' matrices, experts and sums over GPUs, for so many new tokens."""
        shape = self.shape
        moved = 2.0 * rows * shape.hidden_size * _PASSES_A_LAYER
        layer = (
            self.attention_matrices(rows)
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
        count = small_kernels(self.shape, self.matrix_format, self._whole_attention)
        layer = count * over.small_kernel_s
        return np.asarray(self.shape.layers * layer + over.step_s + over.sequence_s * sequences)

    def attention_matrices(self, rows: FloatArray) -> FloatArray:
        """Seconds of one layer's projections around attention; none where its table has them."""
        if self._whole_attention:
            return np.zeros(np.shape(rows))
        local, latent = self._local, self.shape.latent
        if latent is not None:
            return self._latent_matrices(local.query_heads, latent, rows)
        queries, width = local.query_heads * local.head_dim, local.hidden_size
        projected = queries + 2 * local.kv_heads * local.head_dim
        form = self.matrix_format
        return np.asarray(
            self.tables.matrix(projected, width, form, rows)
            + self.tables.matrix(width, queries, form, rows)
        )

    def _latent_matrices(self, heads: int, latent: LatentAttention, rows: FloatArray) -> FloatArray:
        """Into both latents, queries out of theirs, the absorbed products, and out of the values.

        Prompts multiply keys and values out of the latent instead, which is as much work.
        """
        width, form, rank = self.shape.hidden_size, self.matrix_format, latent.query_lora_rank
        asked = heads * (latent.nope_dim + latent.rope_dim)
        down = latent.kv_lora_rank + latent.rope_dim + (asked if rank is None else rank)
        seconds = self.tables.matrix(down, width, form, rows) + self.tables.absorbed(heads, rows)
        if rank is not None:
            seconds = seconds + self.tables.matrix(asked, rank, form, rows)
        return seconds + self.tables.matrix(width, heads * latent.value_dim, form, rows)

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
                experts.count, self.gpus // self.expert_parallel, self.expert_parallel,
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
