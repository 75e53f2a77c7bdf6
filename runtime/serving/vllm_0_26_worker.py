"""vLLM 0.26's worker under a plan; apart from ``vllm_0_26`` since it starts what it imports."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from kvtune.runtime.serving.vllm_0_26 import WholeSpec
from kvtune.runtime.serving.vllm_planning import check_layer, plan_for

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class Worker(_Worker):  # type: ignore[misc]
    """vLLM's worker, whose layers ask for what the plan takes."""

    def init_device(self) -> None:
        """Prepare the device, and have the model runner report the plan's cache specification.

        This worker asks for it, and the runner itself when it profiles the memory of graphs.
        """
        super().init_device()
        runner = self.model_runner
        runner.get_kv_cache_spec = functools.partial(self._planned, runner.get_kv_cache_spec)

    def _planned(self, layers_of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The plan's spec for the first layer; the others share its memory.

        Raises:
            KvtuneError: a layer or a plan that this cannot serve.
        """
        layers = layers_of()
        for spec in layers.values():
            check_layer(spec)
        first, *others = layers
        self.model_runner.shared_kv_cache_layers |= dict.fromkeys(others, first)
        spec = layers[first]
        with set_current_vllm_config(self.vllm_config):
            planned = plan_for(spec.num_kv_heads, spec.head_size)
        known = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}
        known |= {"dtype": torch.int8, "non_causal": True, "indexes_kv_by_block_stride": False}
        return {first: WholeSpec(**known, planned=planned)}

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As ever; and lets steps read the block table where it is written, on the host."""
        super().initialize_from_config(kv_cache_config)
        runner = self.model_runner
        for group in itertools.chain.from_iterable(runner.attn_groups):
            for builder in group.metadata_builders:
                builder.host_table = lambda: runner.input_batch.block_table[0].get_numpy_array()
