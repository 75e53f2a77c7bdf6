"""The engine of ``kvtune serve-sim``, as its options have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvtune.cli.stack_options import CacheDtype
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.profiles.gpus import GpuProfile
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.serving.server import Server


@dataclass(frozen=True)
class EngineTyped:
    """Options as they were typed; see their help."""

    mem: str | None
    weights: str
    gpus: int
    stack: StackChoice
    kv_cache_dtype: CacheDtype | None
    expert_parallel: int
    max_sequences: int
    max_batched_tokens: int
    order: Literal["arrival", "cached"]
    block: int
    host_mem: str | None
    left_to_answers: float | None

    def server(self, shape: ModelShape, card: GpuProfile) -> Server:
        """What serves a model on cards.

        Raises:
            KvtuneError: an option makes no sense, or nothing is left for the cache.
        """
        from kvtune.cli.stack_options import check_expert_parallel, read_cache_dtype
        from kvtune.common.units import parse_bytes
        from kvtune.simulator.serving.server import StackKernels, server
        from kvtune.simulator.serving.step import READING, Limits

        check_expert_parallel(self.stack, self.expert_parallel, shape, self.gpus)
        return server(
            shape,
            card,
            card.visible_bytes if self.mem is None else parse_bytes(self.mem),
            self.weights,
            Limits(
                self.max_sequences, self.max_batched_tokens, self.order, READING[self.stack],
                left_to_answers=self.left_to_answers,
            ),
            block_tokens=self.block,
            host_bytes=0 if self.host_mem is None else parse_bytes(self.host_mem),
            gpus=self.gpus,
            kernels=StackKernels(
                self.stack,
                read_cache_dtype(self.stack, self.kv_cache_dtype) or "bfloat16",
                self.expert_parallel,
            ),
        )  # fmt: skip
