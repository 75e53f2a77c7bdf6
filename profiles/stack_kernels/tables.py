"""Kernel times of one system and stack, of one layer each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.profiles.elsewhere import StackTables
from kvtune.profiles.stack_kernels.attention import Heads, attention_s, attention_table
from kvtune.profiles.stack_kernels.experts import (
    ExpertShape,
    expert_formats,
    experts_s,
)
from kvtune.profiles.stack_kernels.grid import FloatArray
from kvtune.profiles.stack_kernels.latent import LatentCall, absorbed_curve, latent_s
from kvtune.profiles.stack_kernels.matrices import fastest_matrix, matrices_by_format
from kvtune.profiles.stack_kernels.sums import all_reduce_curve


@dataclass(frozen=True)
class ServingTables(StackTables):
    """The tables of one system and stack."""

    def decode_attention(
        self,
        heads: Heads,
        window: int | None,
        kv_format: str,
        batch: npt.ArrayLike,
        length: npt.ArrayLike,
    ) -> FloatArray:
        """Seconds of one layer's attention of a decode step.

        Args:
            heads: of one GPU.
            window: tokens that the layer sees, None for all.
            kv_format: ``bfloat16`` or ``fp8``.
            batch: sequences.
            length: tokens in each one's cache.
        """
        return attention_s(self, "generation", heads, window, kv_format, batch, length)

    def context_attention(
        self,
        heads: Heads,
        window: int | None,
        kv_format: str,
        batch: npt.ArrayLike,
        prompt: npt.ArrayLike,
    ) -> FloatArray:
        """Seconds of one layer's causal attention over whole prompts."""
        return attention_s(self, "context", heads, window, kv_format, batch, prompt)

    def latent_attention(
        self, call: LatentCall, batch: npt.ArrayLike, length: npt.ArrayLike
    ) -> FloatArray:
        """Seconds of one layer's latent attention; with its matrices where ``call`` says so."""
        return latent_s(self, call, batch, length)

    def absorbed(self, heads: int, rows: npt.ArrayLike) -> FloatArray:
        """Seconds of a layer's two products that bring queries into the latent and values out."""
        return absorbed_curve(self, heads).at(rows)

    def matrix(self, out: int, wide: int, number_format: str, rows: npt.ArrayLike) -> FloatArray:
        """Seconds of ``[rows, wide] x [wide, out]`` in a format of the tables.

        Of all stacks' kernels on the system the fastest: they call the same libraries, and where
        one stack's table is slower, its harness is taken not to have tuned that kernel (vLLM's
        blocks of fp8 on a B200 are 8 times slower in its table, and not in whole runs).
        """
        return fastest_matrix(self, out, wide, number_format).at(rows)

    def matrix_formats(self) -> set[str]:
        """Formats that matrix products were measured in."""
        return set(matrices_by_format(self))

    def experts(self, shape: ExpertShape, number_format: str, tokens: npt.ArrayLike) -> FloatArray:
        """Seconds of one layer's routed experts on one GPU, by the faster of a format's kernels."""
        return experts_s(self, shape, number_format, tokens)

    def has_experts(self, number_format: str) -> bool:
        """Whether routed experts were measured in a format, by this stack."""
        return number_format in expert_formats(self)

    def all_reduce(self, gpus: int, numbers: npt.ArrayLike) -> FloatArray:
        """Seconds of a sum over GPUs of so many 16-bit numbers; nothing on one GPU."""
        if gpus == 1:
            return np.zeros(np.shape(numbers))
        return all_reduce_curve(self, gpus).at(numbers)

    def source(self) -> str:
        """Stack, version and kernel, for people."""
        table = attention_table(self, "generation", 128)
        return f"{self.stack} {table.version if table else '?'} on {self.system}"
