"""Every kind of part on a GPU: pages against replay, a graph against plain steps, reading less.

    python benchmarks/parts_gpu.py --out benchmarks/results/parts-h200.json

Random weights. ``answers`` holds the attention of the paged cache against that of replay's
compressed prompt in float64, head by head, for the six systems of six kinds and two formats without
pages. ``graph`` decodes a small model with a CUDA graph and step by step: the tokens must be equal.
``reading less`` times a decode step's attention of one layer of an 8B shape at 8 x 32k tokens: all
of it, and 1/20 of it selected by Quest's bounds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timed_graph import captured_call
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.policies.apply import apply, linked
from kvtune.policies.attention import attend
from kvtune.policies.formats.gear import Gear
from kvtune.policies.formats.grouped import Int2, Int3, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.knorm import KNorm
from kvtune.policies.methods.mikv import MiKV
from kvtune.policies.methods.minicache import MiniCache
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.runtime import load_cache
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.graph import generate
from kvtune.runtime.kernels.launch import Scratch

PROMPT, LAYERS, KV_HEADS, GROUP, HEAD_DIM = 1500, 4, 2, 4, 64
OPTIONS = {
    "L2 norm of keys": Option(KNorm(), Budget(tokens=300)),
    "RazorAttention": Option(Razor(), Budget(tokens=300), Int4(), Int4()),
    "MiKV, balanced": Option(MiKV(), Budget(share=0.2), Int2(keys_by="token"), Int2()),
    "MiKV": Option(MiKV(balanced=False), Budget(share=0.2), Int2(keys_by="token"), Int2()),
    "GEAR": Option(Full(), ALL, Gear(), Gear()),
    "Quest": Option(Quest(block=64), Budget(tokens=256)),
    "Quest in int4": Option(Quest(block=64), Budget(tokens=256), Int4(), Int4()),
    "MiniCache": Option(MiniCache(), Budget(share=0.05)),
    "int3": Option(Full(), ALL, Int3(), Int3()),
}


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        vocab_size=1000, initializer_range=0.1,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).bfloat16().eval()


def answers(model: Any, option: Option) -> float:
    """Largest difference of attention over pages from that of replay, over its largest value."""
    policy = Policy.uniform(option, LAYERS, KV_HEADS)
    cache, seen = load_cache(policy, model), dict[int, Signals]()
    for layer in cache.layers:
        remember(layer, seen)
    ids = torch.randint(1, 1000, (1, PROMPT), device="cuda")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    worst = 0.0
    budgets = policy.budgets(PROMPT)
    for number, layer in enumerate(cache.layers):
        signals = linked(seen[number], policy.heads[number], LAYERS, seen.__getitem__)
        part = apply(policy, number, budgets[number].tolist(), signals)
        q = torch.randn(KV_HEADS, GROUP, HEAD_DIM, device="cuda")
        scratch = Scratch(KV_HEADS, layer.paged.slots, GROUP, HEAD_DIM, "cuda")
        ours = layer.paged.attend(q.bfloat16(), scratch, signals.scale).double()
        theirs = exact(q.bfloat16().double(), part, signals.scale)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def remember(layer: Any, seen: dict[int, Signals]) -> None:
    """Keep what a layer's methods were shown."""
    choose = layer.choose

    def noting(row: int, signals: Signals) -> Any:
        seen[layer.number] = replace(signals, linked=None, _memo={})
        return choose(row, signals)

    layer.choose = noting


def exact(q: Tensor, part: Any, scale: float) -> Tensor:
    visible, weights = part.visible(q[:, :, None].float()), part.weights
    keys, values = part.keys.double(), part.values.double()
    seen = None if visible is None else visible[..., 0, :]
    return attend(q, keys, values, seen, scale, None if weights is None else weights[..., 0, :])[0]


def graph(model: Any, option: Option) -> dict[str, Any]:
    """Whether a graph draws the tokens that the same loop draws step by step."""
    policy = Policy.uniform(option, LAYERS, KV_HEADS)
    ids = torch.randint(1, 1000, (2, PROMPT), device="cuda")
    captured = load_cache(policy, model, new_tokens=64)
    fast = generate(model, captured, ids, new_tokens=64)
    with patch.object(PolicyCache, "can_be_captured", new=False):
        slow = generate(model, load_cache(policy, model, new_tokens=64), ids, new_tokens=64)
    return {"captured": captured.can_be_captured, "equal": int((fast == slow).sum()), "of": 128}


def reading_less() -> dict[str, float]:
    """Microseconds of one layer's attention at 8 x 32k, all read and 1/20 read."""
    from kvtune.benchmarks.decode_step import timed

    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=100, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    found = {}
    for name, option in {
        "all read": Option(),
        "1/20 read": Option(Quest(block=64), Budget(tokens=1638)),
    }.items():
        cache = load_cache(Policy.uniform(option, 1, 8), model)
        with torch.no_grad():
            for _ in range(1):
                model(torch.randint(1, 100, (8, 32768), device="cuda"), past_key_values=cache)
        layer = cache.layers[0].paged
        q = torch.randn(64, 4, 128, device="cuda", dtype=torch.bfloat16)
        scratch = Scratch(64, layer.slots, 4, 128, "cuda")
        replay = captured_call(lambda layer=layer, q=q, s=scratch: layer.attend(q, s, 128**-0.5))
        found[name] = 1e6 * timed(replay, 50)
        found[f"{name}, resident MB"] = cache.prompt_bytes() / 1e6
        del cache, layer
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "answers": {},
        "graph": {},
    }
    model = small_model()
    for name, option in OPTIONS.items():
        for part, measure in (("answers", answers), ("graph", graph)):
            try:
                found[part][name] = measure(model, option)
            except Exception as error:
                found[part][name] = f"failed: {type(error).__name__}: {error}"[:1000]
            print(part, name, found[part][name], flush=True)
    found["reading less, one layer, 8 x 32k"] = reading_less()
    print(json.dumps(found["reading less, one layer, 8 x 32k"]))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
