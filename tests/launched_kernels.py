"""Lists the kernels that a plan launches and those that are compiled ahead for it, as JSON.

    TRITON_INTERPRET=0 python -m kvtune.tests.launched_kernels

Nothing is compiled and nothing is launched: what Triton would compile is written down instead. So
it runs without a GPU, in a process of its own, as Triton decides at its import whether it compiles.
"""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime import admission, compile_only, graph, promise
from kvtune.runtime.cache import policy_cache
from kvtune.runtime.cache.triton_backend import TritonBackend
from kvtune.runtime.compiled_ahead import kernels_of
from kvtune.runtime.fuse import fused
from kvtune.traces.geometry import read_geometry

TARGET = "cuda", 90, 32
TOKENS, BATCH, NEW = 160, 3, 4
MODEL = LlamaConfig(
    vocab_size=64, hidden_size=576, intermediate_size=384, num_hidden_layers=3,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64,
)  # fmt: skip


class NoBench:
    """Looks at no device."""

    def look(self) -> None:
        """Nothing to see."""


def plan() -> Policy:
    """Layers of several formats, of one, and of one with exact tokens."""
    few, snap = Budget(tokens=64), SnapKV()
    mixed = Option(H2O(), few, Int4(), Int4()), Option(H2O(), few, Int2(), Int2()), Option()
    sinks = Option(snap, few, Int4(exact_first=4), Int4(exact_first=4))
    return Policy("p", (mixed, 3 * (sinks,), 3 * (Option(snap, few, Int8(), Int8()),)))


def recorded(into: list[str], call: Any) -> None:
    """Write down what Triton would compile during a call."""
    run = JITFunction.run

    def dry(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def note(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any,
        warmup: bool,
    ) -> None:  # fmt: skip
        plain = [sorted(part.items(), key=str) for part in (signature, constants, attrs)]
        into.append(f"{self.fn.__name__} {plain} {options.hash()}")

    with patch.object(JITFunction, "run", dry), patch.object(JITFunction, "_do_compile", note):
        call()


def launched(policies: list[Policy], model: Any) -> list[str]:
    """By running them; what no kernel has computed is whatever memory held."""
    found: list[str] = []
    prompts = torch.randint(0, MODEL.vocab_size, (BATCH, TOKENS))

    def run() -> None:
        for policy in policies:
            for some in (prompts[:1], prompts):
                promise._run(policy, model, some, NEW, NoBench())  # type: ignore[arg-type]

    with (
        patch.object(policy_cache, "backend_for", lambda _: TritonBackend()),
        patch.object(policy_cache.PolicyCache, "check_finite", lambda _: None),
        patch.object(admission, "fused_on_gpu", fused),
        patch.object(graph, "fused_on_gpu", fused),
    ):
        recorded(found, run)
    return found


def ahead(policies: list[Policy], model: Any) -> list[str]:
    """What the processes are sent."""
    found: list[str] = []
    geometry = read_geometry(model)
    for part in kernels_of(policies, geometry, MODEL, "bfloat16", TARGET).shares(3):
        for work in compile_only.WORK:
            for call in work(part):
                recorded(found, call)
    return found


def main() -> None:
    driver.set_active(compile_only.Aimed(TARGET))
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL).to(torch.bfloat16).eval()
    policies = [plan(), Policy.uniform(Option(), 3, 3)]
    print(json.dumps({"launched": launched(policies, model), "ahead": ahead(policies, model)}))


if __name__ == "__main__":
    main()
