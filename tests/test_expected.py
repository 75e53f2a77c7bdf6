"""What the simulator says of a timed run: compression is part of the prefill, as it is measured."""

from __future__ import annotations

from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.steps import prefill
from kvtune.tuner.expected import Card


def test_prefill_holds_compression_of_the_whole_batch() -> None:
    shape, gpu = find_model("llama-8b"), find_gpu("h100")
    card, read = Card(shape, gpu, 4096), prefill(shape, gpu, "bf16", 4096, 3, "runtime")
    full = Policy.uniform(Option(), shape.layers, shape.kv_heads)
    assert card.expect(full, 3).prefill == read
    for method in (SnapKV(), KVzip()):
        option = Option(method, Budget(share=0.1))
        policy = Policy.uniform(option, shape.layers, shape.kv_heads)
        beside = compression(policy, shape, gpu, 4096, read, 3)
        found = card.expect(policy, 3).prefill
        assert found.value == read.value + beside.value
        assert (found.low, found.high) == (read.low + beside.low, read.high + beside.high)
        assert found.tier == beside.tier
        assert (beside.value > read.value) == isinstance(method, KVzip)
