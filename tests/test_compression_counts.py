"""What methods declare of their work, beside what torch is really asked to do on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kvtune.common.rotary import query_moments
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.method import find_method
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, work_of_signals
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime.cache.choosing import choose
from kvtune.simulator.latency.compression import compression
from kvtune.simulator.latency.steps import prefill

H, G, D = 3, 2, 64
COUNTED = (
    "streaming_llm", "snapkv", "h2o", "tova", "knorm", "keydiff", "keydiff_blockwise", "keyformer",
    "cake", "expected_attention", "cam", "ems_reconstruction", "attention_matching", "a2sf",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Sees every operation that makes or changes numbers; views of others do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def counted(self, name: str, given: Any, found: Any) -> int:
        """What the operation counts for, by its name, what it was given and what it has made."""
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.count += self.counted(func._schema.name, (args, kwargs), found)
        return found


class Launches(Operations):
    """Counts operations that would start a kernel."""

    def counted(self, name: str, given: Any, found: Any) -> int:
        return int(not name.startswith(("aten::empty", "aten::detach")))


class Traffic(Operations):
    """Counts the bytes that operations read and write, each number once an operation."""

    def counted(self, name: str, given: Any, found: Any) -> int:
        seen = [*torch.utils._pytree.tree_leaves((given, found))]
        held = [x.untyped_storage().nbytes() for x in seen if isinstance(x, torch.Tensor)]
        whole = [x.numel() * x.element_size() for x in seen if isinstance(x, torch.Tensor)]
        return sum(map(min, held, whole))  # an expanded number is read once


def signals(tokens: int) -> Signals:
    """Of a random prompt; column sums are given, as the runtime's own kernel makes them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, tokens, D, generator=generator) for heads in (H * G, H, H))
    drawn = torch.rand(H * G, tokens, generator=generator)
    return Signals(q, k, v, D**-0.5, drawn, layer=0)


def policy_of(name: str) -> Policy:
    option = Option(find_method(name)(), Budget(share=0.1), Int4(), Int4())
    return Policy("one layer", ((option,) * H,))


@pytest.mark.parametrize("name", COUNTED)
def test_declared_launches_are_those_that_torch_makes(name: str) -> None:
    tokens, policy = 512, policy_of(name)
    budgets = policy.budgets(tokens)[0].tolist()
    seen = signals(tokens)
    with Launches() as counted:
        choose(policy, budgets, seen, evicts=False)
    method = policy.heads[0][0].method
    declared = method.work(LayerShape(tokens, H * G, H, D), budgets[0]).launches
    assert 0.6 < declared / counted.count < 1.6


def test_moments_of_queries_move_what_torch_moves() -> None:
    waves = tuple(10_000 ** (-i / D) for i in range(0, D, 2))
    tokens, rope = 4096, SimpleNamespace(inverse_frequencies=waves, attention_factor=1.0)
    queries = torch.randn(H * G, tokens, D).bfloat16()
    with Traffic() as counted:
        query_moments(queries, rope)
    declared = work_of_signals(Needs(query_moments=True), LayerShape(tokens, H * G, H, D))
    assert 0.75 < declared.moved_bytes / counted.count < 1.33


def test_a_windows_products_are_those_that_torch_counts() -> None:
    seen = signals(300)
    with FlopCounterMode(display=False) as counted:
        seen.window_attention(32)
    declared = work_of_signals(Needs(window=32), LayerShape(300, H * G, H, D))
    assert declared.flops == counted.get_total_flops()


def test_column_sums_multiply_what_their_two_passes_do() -> None:
    """Blocks of 64 queries and keys on and below the diagonal, in the kernel's order, twice."""
    tokens, block = 1024, 64
    q, k = torch.randn(tokens, D), torch.randn(tokens, D)
    blocks = range(0, tokens, block)
    with FlopCounterMode(display=False) as counted:
        for _ in ("row sums", "columns"):
            for at in blocks:
                for first in range(0, at + block, block):
                    q[at : at + block] @ k[first : first + block].T
    declared = work_of_signals(Needs(column_sums=True), LayerShape(tokens, 1, 1, D)).softmax_flops
    diagonal = block / tokens  # half of what is computed on it is not needed
    assert declared == pytest.approx(counted.get_total_flops() / (1 + diagonal))


def test_prompts_that_were_timed_are_compressed_as_long_as_it_took() -> None:
    """On an H200: 82 ms a prompt of 41, and 20 of 74; which layers needed sums is inferred."""
    gpu = find_gpu("h200")

    def of_prompt(model: str, tokens: int, batch: int, share: float) -> float:
        """Seconds, where so many of the layers need column sums and the others a window."""
        shape = find_model(model)
        some = round(share * shape.layers)
        heads = [
            (Option(method, Budget(share=0.2), Int4(), Int4()),) * shape.kv_heads
            for method in [H2O()] * some + [SnapKV()] * (shape.layers - some)
        ]
        policy = Policy("plan", tuple(heads))
        read = prefill(shape, gpu, "bf16", tokens, batch, "runtime")
        return compression(policy, shape, gpu, tokens, read, batch).value / batch

    assert of_prompt("smollm2-135m", 7936, 74, 1.0) == pytest.approx(0.0197, rel=0.2)
    assert of_prompt("llama-3.1-8b", 8192, 41, 0.5) == pytest.approx(0.082, rel=0.2)


def test_short_prompts_wait_for_the_host_each() -> None:
    """On an H200 eight prompts of SmolLM2 took 11 ms each, with a method that only moves tokens."""
    shape, gpu = find_model("smollm2-135m"), find_gpu("h200")
    policy = Policy.uniform(Option(StreamingLLM(), Budget(share=0.1)), shape.layers, shape.kv_heads)
    read = prefill(shape, gpu, "bf16", 512, 1, "runtime")
    one, many = (compression(policy, shape, gpu, 512, read, n).value for n in (1, 64))
    assert one > shape.layers * 15 * 1.5e-5
    assert many == pytest.approx(64 * one, rel=0.05)
