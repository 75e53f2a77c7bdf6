"""Requests that come and go in a serving engine's memory, layer by layer: right, and how fast.

    python benchmarks/serving_gpu.py --out FILE            # one GPU; random keys and values
    python benchmarks/serving_gpu.py --device cpu --tiny --out FILE

``right`` serves a few requests by kernels and by plain torch and compares every answer; on a GPU
again with steps that are replayed from a CUDA graph of rows of nobody. ``step`` times what
attention adds to a decode step of many requests under a plan, tables included, beside flash
attention over uncompressed keys and values of the same lengths: while the same requests go on, when
one of them has been replaced, and replayed from a graph. Reading and compressing one prompt stands
beside attention over it alone, each prompt of a length that none had before, and of one that some
had. No model is run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.common.files import write_json
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int2, Int4, Int8
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.plain_backend import PlainBackend
from kvtune.runtime.cache.which_backend import backend_for
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.running import Running
from kvtune.runtime.serving.seat_planning import most_room
from kvtune.traces.seam import causal_attention, prompt_attention

Draw = Callable[[int, int, int, torch.device], list[Tensor]]
HQ, H, D = 32, 8, 128  # of an 8B model's layer
OPTIONS = (
    Option(SnapKV(), Budget(share=0.12)),
    Option(SnapKV(), Budget(share=0.20), Int8(), Int8()),
    Option(SnapKV(), Budget(share=0.40), Int4(), Int4()),
    Option(SnapKV(), Budget(share=0.50), Int4(), Int2()),
    Option(SnapKV(), Budget(share=0.20), Fp8(), Fp8()),
    Option(StreamingLLM(), Budget(tokens=128)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = [(4, 300)] if arguments.tiny else [(8, 2048), (32, 2048), (64, 4096), (128, 4096)]
    found: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__}
    parts = {"right": lambda: right(device)}
    if device.type == "cuda":
        parts["right, replayed"] = lambda: right(device, replayed=True)
    parts["attention over prompts"] = lambda: attention_over_prompts(device)
    for count, prompt in sizes:
        parts[f"step of {count} x {prompt}"] = lambda n=count, p=prompt: step(device, n, p)
    for name, part in parts.items():
        print(f"{name}...", file=sys.stderr, flush=True)
        try:
            found[name] = part()
        except Exception as fault:
            traceback.print_exc()
            found[name] = {"fault": repr(fault)}
        write_json(arguments.out, found)
        print(name, found[name], flush=True)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def plan(layers: int) -> PlannedBlocks:
    rows = [[OPTIONS[(n + h) % len(OPTIONS)] for h in range(H)] for n in range(layers)]
    return PlannedBlocks(Policy("mixed", tuple(map(tuple, rows))), D)


class Table:
    """Blocks of each request, one after another from 1 on."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def first(self) -> list[int]:
        return [row[0] for row in self.rows]

    def blocks(self, row: int, start: int, stop: int) -> list[int]:
        return self.rows[row][start:stop]


class Served:
    """Requests with prompts of these lengths, that have been read."""

    def __init__(
        self,
        device: torch.device,
        prompts: list[int],
        layers: int,
        backend: Backend,
        draw: Draw | None = None,
    ) -> None:
        self.device, self.planned = device, plan(layers)
        self.draw = draw or drawn_alike
        self.layers, self.lengths = layers, list(prompts)
        each = [self.planned.blocks(n, n + 192) for n in prompts]
        starts = [1 + sum(each[:at]) for at in range(len(each) + 1)]
        self.rows = [list(range(a, b)) for a, b in pairwise(starts)]
        room = most_room(self.planned, len(prompts), max(prompts) + 256)
        self.running = Running(self.planned, device, backend, room)
        self.graph: torch.cuda.CUDAGraph | None = None
        size = starts[-1] * self.planned.block_bytes
        self.running.attach(torch.zeros(size, dtype=torch.int8, device=device))
        for at in range(len(prompts)):
            self.read(at)

    def read(self, at: int) -> list[Tensor]:
        """One request's prompt, anew."""
        count = self.lengths[at]
        begun = self.running.begin(Table([self.rows[at]]), [0, count], [count])
        return [self.attend(begun, layer, count) for layer in range(self.layers)]

    def generate(self) -> list[Tensor]:
        """A token of every request; each layer's answers."""
        begun = self.begin()
        return [self.attend(begun, layer, len(self.rows)) for layer in range(self.layers)]

    def begin(self) -> Any:
        """A step in which every request generates."""
        self.lengths = [n + 1 for n in self.lengths]
        return self.running.begin(Table(self.rows), list(range(len(self.rows) + 1)), self.lengths)

    def replay(self) -> list[Tensor]:
        """The same from a graph, which is captured at the first call."""
        graph = self.graph or self.capture()
        for layer, kept in enumerate(self.inputs):
            for tensor, drawn in zip(kept, self.drawn_for(layer), strict=True):
                tensor.copy_(drawn)
        self.begin()
        graph.replay()
        return self.outputs

    def drawn_for(self, layer: int) -> list[Tensor]:
        """What a step that is about to begin is given."""
        return self.draw(layer, len(self.rows), sum(self.lengths) + len(self.rows), self.device)

    def capture(self) -> torch.cuda.CUDAGraph:
        """A step of nobody, with room for the requests that there are."""
        self.inputs = [[x.clone() for x in self.drawn_for(n)] for n in range(self.layers)]
        self.outputs = [torch.empty_like(q) for q, _, _ in self.inputs]
        step = self.running.nobody(len(self.rows))
        self.launch(step)
        torch.cuda.synchronize()
        step, self.graph = self.running.capture(len(self.rows)), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch(step)
        return self.graph

    def launch(self, step: Any) -> None:
        for layer, (qkv, out) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            self.running.attend(step, layer, qkv, out, D**-0.5)

    def attend(self, begun: Any, layer: int, tokens: int) -> Tensor:
        q, k, v = self.draw(layer, tokens, sum(self.lengths), self.device)
        out = torch.empty_like(q)
        self.running.attend(begun, layer, (q, k, v), out, D**-0.5)
        return out


def drawn_alike(layer: int, tokens: int, seed: int, device: torch.device) -> list[Tensor]:
    """The same numbers on any device, drawn on the host, which takes longer than a step."""
    generator = torch.Generator().manual_seed(seed * 100 + layer)
    shapes = [(tokens, heads, D) for heads in (HQ, H, H)]
    return [torch.randn(s, generator=generator).bfloat16().to(device) for s in shapes]


@functools.cache
def drawn_once(tokens: int, device: torch.device) -> list[Tensor]:
    """The same numbers at every step, so that no time goes into drawing them."""
    shapes = [(tokens, heads, D) for heads in (HQ, H, H)]
    return [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]


def right(device: torch.device, replayed: bool = False) -> dict[str, Any]:
    """Kernels beside plain torch over the same numbers, requests joining and leaving."""
    prompts = [200, 65, 131, 1]
    one = Served(device, prompts, 2, backend_for(device))
    other = Served(torch.device("cpu"), prompts, 2, PlainBackend())
    gaps = []
    for number in range(70):
        if number == 20:
            one.read(1)
            other.read(1)
        answers = one.replay() if replayed else one.generate()
        pairs = zip(answers, other.generate(), strict=True)
        gaps.append(max(float((a.float().cpu() - b.float()).abs().max()) for a, b in pairs))
    return {"largest_difference": max(gaps), "right": max(gaps) < 0.03, "steps": len(gaps)}


def step(device: torch.device, count: int, prompt: int) -> dict[str, Any]:
    """Milliseconds a layer of one decode step."""
    layers = 2 if device.type == "cpu" else 8

    def draw(layer: int, tokens: int, seed: int, device: torch.device) -> list[Tensor]:
        return drawn_once(tokens, device)

    served = Served(device, [prompt] * count, layers, backend_for(device), draw)
    served.generate()
    same = [timed(device, served.generate) / layers for _ in range(9)]
    changed, reading, again, replayed = [], [], [], []
    for at in range(3):
        served.draw(0, served.lengths[at], 0, device)  # drawn before time counts
        reading.append(timed(device, lambda at=at: served.read(at)) / layers)
        again.append(timed(device, lambda at=at: served.read(at)) / layers)
        changed.append(timed(device, served.generate) / layers)
    if device.type == "cuda":
        served.replay()
        replayed = [timed(device, lambda: replay_only(served)) / layers for _ in range(9)]
    q = torch.randn(count, HQ, D, device=device, dtype=torch.bfloat16)
    keys, values = (
        torch.randn(count, H, prompt, D, device=device, dtype=torch.bfloat16) for _ in "kv"
    )

    def full() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=True
        )

    queries, prompts, answers = drawn_once(prompt, device)
    shown = [x.transpose(0, 1)[None] for x in (queries, prompts, answers)]

    def read_full() -> None:
        torch.nn.functional.scaled_dot_product_attention(*shown, is_causal=True, enable_gqa=True)

    full()
    read_full()
    held = sum(len(rows) for rows in served.rows) * served.planned.block_bytes
    return {
        "ms_a_layer": statistics.median(same),
        "ms_a_layer_after_a_change": statistics.median(changed),
        "ms_a_layer_uncompressed": statistics.median(timed(device, full) for _ in range(9)),
        "ms_a_layer_replayed": statistics.median(replayed) if replayed else None,
        "ms_a_layer_of_a_prompt_of_a_new_length": statistics.median(reading),
        "ms_a_layer_of_a_prompt_of_a_known_length": statistics.median(again),
        "ms_a_layer_of_a_prompt_uncompressed": statistics.median(
            timed(device, read_full) for _ in range(9)
        ),
        "share_of_bytes": held / (count * (prompt + 192) * layers * H * 2 * D * 2),
    }


def replay_only(served: Served) -> None:
    """A step of the same requests, whose numbers are those of the step before."""
    graph = served.graph or served.capture()
    served.begin()
    graph.replay()


def attention_over_prompts(device: torch.device) -> dict[str, Any]:
    """Milliseconds of causal attention over a prompt, of lengths that come for the first time."""
    first = 300 if device.type == "cpu" else 1200
    ways = {
        "as PyTorch chooses": functools.partial(causal_attention, window=None),
        "ours": prompt_attention,
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        new, known = [], []
        for tokens in range(first, first + 12):
            qkv = [x.transpose(0, 1)[None] for x in drawn_once(tokens, device)]
            work = functools.partial(way, *qkv, D**-0.5)
            new.append(timed(device, work))
            known.append(timed(device, work))
        first += 100
        found[name] = {
            "new_length_ms": statistics.median(new), "known_length_ms": statistics.median(known)
        }  # fmt: skip
    return found


def timed(device: torch.device, work: Any) -> float:
    """Milliseconds, host included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
