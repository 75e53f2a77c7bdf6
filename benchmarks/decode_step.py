"""A decode step of the Llama-8B shape under a plan: time, memory, and the largest batch.

    python benchmarks/decode_step.py --out decode_step.json [--seconds 240]

Random weights and prompts, the plan's lengths and formats; transformers' own model, decoded as a
CUDA graph. First a small model is decoded with and without graph and fused kernels, and must say
the same. The uncompressed cache runs in the same pages with every token in bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.policies.option import Option
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.device import CudaBench
from kvtune.runtime.fuse import fused
from kvtune.runtime.graph import DecodeLoop, generate
from kvtune.runtime.largest import search_largest
from kvtune.runtime.measure.filled import filled
from kvtune.runtime.timing import time_beside

PLAN = Path(__file__).with_name("plans") / "llama-8b-32k-12-percent.yaml"
LAYERS, KV_HEADS, HEAD_DIM, CONTEXT, BATCH = 32, 8, 128, 32768, 8
NEW_TOKENS = 256
ROOM = 32  # new tokens of a sequence where the largest batch is looked for


def check_small() -> dict[str, Any]:
    """Of a small model: whether its tokens repeat, and how far its logits are from float32's.

    Fused kernels must be no further than plain modules are, but for chance.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=1000, initializer_range=0.1,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    exact = copy.deepcopy(model).float()
    options = read_policy(PLAN).bind(LAYERS, KV_HEADS).heads
    policy = Policy("small", tuple(row[2:8:3] for row in options[8:20:3]))
    ids = torch.randint(1, 1000, (3, 700), device="cuda")
    mask = (
        torch.arange(700, device="cuda") >= torch.tensor([[0], [60], [333]], device="cuda")
    ).long()
    tokens = generate(model, load_cache(policy, model), ids, mask, new_tokens=80)
    again = generate(model, load_cache(policy, model), ids, mask, new_tokens=80)
    full, forced = Policy.uniform(Option(), 4, 2), tokens[:, :64]
    right = told_at_once(exact, ids, mask, forced)
    apart = {
        name: float((told(model, full, ids, mask, forced, modules) - right).norm() / right.norm())
        for name, modules in (("fused", fused(model)), ("plain", nullcontext()))
    }
    return {"repeats": bool((tokens == again).all()), "logits from float32's": apart}


@torch.no_grad()
def told_at_once(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The same without a cache."""
    ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return logits[:, -tokens.shape[1] :].transpose(0, 1).float()


@torch.no_grad()
def told(
    model: Any, policy: Policy, ids: Tensor, mask: Tensor, tokens: Tensor, modules: Any
) -> Tensor:
    """Logits ``[T, B, vocabulary]`` of a model that is told what it said: errors do not add up."""
    cache, places = load_cache(policy, model), (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    found = []
    with modules:
        for n, column in enumerate(tokens.unbind(1)):
            at = places[:, -1:] + 1 + n
            answer = model(column[:, None], position_ids=at, past_key_values=cache)
            found.append(answer.logits[:, -1])
    return torch.stack(found).float()


def build_model() -> Any:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def loop_of(model: Any, cache: PolicyCache, batch: int, tokens: int, fuse: bool) -> DecodeLoop:
    first = torch.randint(0, 128256, (batch,), device="cuda")
    positions = torch.full((batch,), CONTEXT, device="cuda")
    return DecodeLoop(model, cache, first, positions, tokens, fuse=fuse)


def bandwidth() -> float:
    """Bytes a second of a device copy of 4 GB, read and written."""
    source = torch.randint(0, 255, (4_000_000_000,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 10)


def step_s(loop: DecodeLoop, steps: int, times: int) -> float:
    """Seconds of one decode step."""
    return timed(lambda: loop.advance(steps), times) / steps


def timed(call: Callable[[], Any], times: int) -> float:
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def step(model: Any, policy: Policy, rate: float, profile: bool = False) -> dict[str, Any]:
    """Milliseconds a step beside the bytes it must read, and peak memory."""
    CudaBench().release()
    before = torch.cuda.memory_allocated()
    cache = filled(model, policy, CONTEXT, BATCH, NEW_TOKENS)
    found: dict[str, Any] = {"kernels": []}
    steps, generated = {}, 0
    for fuse in (True, False):
        loop = loop_of(model, cache, BATCH, 64, fuse)
        with loop.ready():
            loop.advance(8)
            steps[fuse] = step_s(loop, 12, 3)
            tokens = sum(int(layer.paged.lengths[1].sum()) for layer in cache.layers)
            generated = generated or 4 * HEAD_DIM * tokens
            if profile and fuse:
                found["kernels"] = kernels_of(lambda: loop.advance(2), 2)  # noqa: B023
    unread = model.model.embed_tokens.weight.numel()
    weights = 2 * (sum(p.numel() for p in model.parameters()) - unread)
    must_read = weights + cache.prompt_bytes() + generated
    return {
        **found,
        "ms": 1e3 * steps[True], "ms, plain modules": 1e3 * steps[False],
        "floor ms": 1e3 * must_read / rate, "over floor": steps[True] * rate / must_read,
        "prompt GB": cache.prompt_bytes() / 1e9, "pages GB": cache.page_bytes() / 1e9,
        "pool GB": cache.pool.memory.numel() / 1e9, "weights read GB": weights / 1e9,
        "before GB": before / 1e9, "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "device free GB": torch.cuda.mem_get_info()[0] / 1e9,
    }  # fmt: skip


def kernels_of(call: Callable[[], Any], steps: int) -> list[list[Any]]:
    """The kernels that take longest: name, microseconds and launches a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)
    return [[r.key[:60], round(r.device_time_total / steps, 1), r.count / steps] for r in rows[:14]]


def largest_batch(model: Any, policy: Policy) -> dict[str, Any]:
    """Sequences that fit at 32k and generate 32 tokens, and how fast; filled in, no prefill."""
    bench = CudaBench()

    def attempt(batch: int) -> float:
        bench.release()
        cache = filled(model, policy, CONTEXT, batch, new_tokens=ROOM)
        loop = loop_of(model, cache, batch, ROOM, fuse=True)
        with loop.ready():
            loop.advance(4)
            return step_s(loop, 6, 2)

    bench.release()
    guess = bench.available_bytes() // sequence_bytes(policy, CONTEXT, HEAD_DIM, Growth(ROOM))
    found = search_largest(attempt, guess)
    bench.release()
    if not found.found:
        return {"batch": 0}
    return {
        "batch": found.batch, "too large": found.too_large, "tries": found.tries, "guess": guess,
        "ms": 1e3 * found.found, "tokens a second": found.batch / found.found,
        "kernels": profiled(model, policy, found.batch // 8 * 8),
    }  # fmt: skip


def profiled(model: Any, policy: Policy, batch: int) -> list[list[Any]]:
    """Kernels of a step of nearly the largest batch, as of most runs and with room to profile."""
    CudaBench().release()
    loop = loop_of(model, filled(model, policy, CONTEXT, batch, ROOM), batch, ROOM, fuse=True)
    with loop.ready():
        loop.advance(4)
        return kernels_of(lambda: loop.advance(2), 2)


def with_prefill(model: Any, policy: Policy) -> dict[str, Any]:
    """What ``kvtune validate`` times, of real prefills: two prompts of 8k random tokens."""
    prompts = torch.randint(0, 128256, (2, 8192), device="cuda")
    found = time_beside(policy, model, prompts, CudaBench())
    return {**asdict(found), "ratios": found.ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    arguments = parser.parse_args()
    begun, found = (
        time.monotonic(),
        {"device": torch.cuda.get_device_name(), "torch": torch.__version__},
    )
    plan = read_policy(PLAN).bind(LAYERS, KV_HEADS)
    full = Policy.uniform(Option(), LAYERS, KV_HEADS)
    state: dict[str, Any] = {}

    def prepare() -> dict[str, float]:
        state["rate"], state["model"] = bandwidth(), build_model()
        return {"copy GB/s": state["rate"] / 1e9}

    parts: dict[str, Callable[[], Any]] = {
        "small model": check_small,
        "bandwidth": prepare,
        "plan": lambda: step(state["model"], plan, state["rate"], profile=True),
        "uncompressed": lambda: step(state["model"], full, state["rate"]),
        "with prefill": lambda: with_prefill(state["model"], plan),
        "largest batch, uncompressed": lambda: largest_batch(state["model"], full),
        "largest batch, plan": lambda: largest_batch(state["model"], plan),
    }
    for name, part in parts.items():
        if time.monotonic() - begun > arguments.seconds:
            found[name] = "skipped: no time"
        else:
            try:
                found[name] = part()
            except Exception as error:
                found[name] = f"failed: {type(error).__name__}: {error}"[-1500:]
                traceback.print_exc()
        arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{time.monotonic() - begun:6.1f} s  {name}: {json.dumps(found[name])}", flush=True)


if __name__ == "__main__":
    main()
