"""Into how many tiles attention of a decode step is best cut, from small batches to the largest.

    python benchmarks/tile_lengths.py --out tile-lengths.json [--seconds 120]
    python benchmarks/tile_lengths.py --out x.json --device cpu --tiny

A layer is cut into about as many tiles as run at once; where it has more rows than that, each row
is one tile, and the last ones of a launch may leave most of the card idle. Attention of all layers
of the plan of ``decode_step.py`` is timed as a CUDA graph, cut into a few times as many. Every cut
must answer as the first one does.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.runtime.cache import sealing
from kvtune.runtime.cache.policy_cache import PolicyCache
from kvtune.runtime.device import CudaBench
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.kernels.tiles import PROGRAMS, plan_tiles
from kvtune.runtime.measure.filled import filled

PLAN = Path(__file__).with_name("plans") / "llama-8b-32k-12-percent.yaml"
HEADS, KV_HEADS, HEAD_DIM, ROOM, GENERATED = 32, 8, 128, 32, 20
TIMES = (None, 1, 2, 4, 8, 16)  # None: as the runtime cuts now


def build_model(layers: int, device: str) -> Any:
    """The plan's heads on a model that is small otherwise: nothing but attention is timed."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=layers, vocab_size=1000,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def cut(cache: PolicyCache, times: int | None) -> list[int]:
    """Lay out all layers' tables anew; how many tiles each has."""
    programs = None if times is None else times * PROGRAMS["mixed"]
    kept = sealing.plan_tiles
    sealing.plan_tiles = lambda segments, cells, _: plan_tiles(segments, cells, programs)
    try:
        for layer in cache.layers:
            layer.paged.seal(ROOM)
    finally:
        sealing.plan_tiles = kept
    return [len(layer.paged.paged.tiles) for layer in cache.layers]


def attending(cache: PolicyCache, q: Tensor) -> Callable[[], Tensor]:
    """Attention of one step, layer after layer; the last layer's output."""
    slots = max(layer.paged.slots for layer in cache.layers)
    scratch = Scratch(len(q), slots, q.shape[1], HEAD_DIM, q.device)

    def attend() -> Tensor:
        for layer in cache.layers:
            output = layer.paged.attend(q, scratch, HEAD_DIM**-0.5)
        return output

    return attend


def seconds_of(attend: Callable[[], Tensor], device: str) -> float:
    """Of one step: replayed as a graph on a GPU."""
    if device == "cpu":
        begun = time.perf_counter()
        attend()
        return time.perf_counter() - begun
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e4


def measure(model: Any, policy: Policy, context: int, batch: int, device: str) -> dict[str, Any]:
    if device != "cpu":
        CudaBench().release()  # what an earlier cache held
    cache = filled(model, policy, context, batch, ROOM)
    rows, group = batch * KV_HEADS, HEADS // KV_HEADS
    draw = torch.Generator(device).manual_seed(0)
    q = torch.randn(rows, group, HEAD_DIM, generator=draw, device=device).bfloat16()
    token = torch.randn(2, batch, KV_HEADS, HEAD_DIM, generator=draw, device=device).bfloat16()
    for layer in cache.layers:
        for _ in range(GENERATED):
            layer.paged.append(*token)
        layer.paged.count_appended(GENERATED)
    found: dict[str, Any] = {"prompt GB": cache.prompt_bytes() / 1e9}
    first: Tensor | None = None
    for times in TIMES:
        tiles = cut(cache, times)
        attend = attending(cache, q)
        output = attend().float()
        first = output if first is None else first
        apart = float((output - first).norm() / first.norm())
        name = "as it is" if times is None else f"{times * PROGRAMS['mixed']} programs"
        found[name] = {
            "us": 1e6 * seconds_of(attend, device), "tiles": sum(tiles) / len(tiles),
            "difference": apart,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers, short prompts")
    asked = parser.parse_args()
    begun, name = time.monotonic(), asked.device
    if asked.device == "cuda":
        name = torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    plan = read_policy(PLAN).bind(32, KV_HEADS)
    context, batches = 32768, (8, 64, 127, 248)
    if asked.tiny:
        plan, context, batches = Policy("tiny", plan.heads[8:24:8]), 2048, (1, 3)
    model = build_model(plan.layers, asked.device)
    for batch in batches:
        part = f"{batch} sequences"
        if time.monotonic() - begun > asked.seconds:
            found[part] = "skipped: no time"
        else:
            try:
                found[part] = measure(model, plan, context, batch, asked.device)
            except Exception as error:
                found[part] = f"failed: {type(error).__name__}: {error}"[-1500:]
                traceback.print_exc()
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - begun:6.1f} s  {part}: {json.dumps(found[part])}", flush=True)


if __name__ == "__main__":
    main()
