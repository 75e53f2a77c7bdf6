"""What the host does to read a step's prompts under a plan: launches, copies, and its own work.

    python benchmarks/serving_host.py --out FILE            # on a CPU; no model is run

Prompts of a serving engine's step are read by 32 layers of 8 KV heads (an 8B model's, with narrow
heads) under the plan of ``vllm_plugin.py``: one, and three of different lengths. Counted are
operations of torch that are kernel launches on a GPU (views are none), copies of host tables, and
launches that write pages. The least processor time of the step after it, in which all generate for
the first time, says what the host does before the GPU has anything to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_plugin import document

from kvtune.benchmarks.serving_gpu import Table
from kvtune.common.files import write_json
from kvtune.runtime.serving import compressing, running
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.running import Running
from kvtune.runtime.serving.seat_planning import most_room

LAYERS, HQ, H, D = 32, 32, 8, 16
STEPS = {"one prompt": [1191], "three prompts": [1100, 1191, 1300]}
VIEWS = frozenset(
    ("view", "_unsafe_view", "transpose", "slice", "select", "unsqueeze", "expand", "alias",
     "detach", "as_strided", "t", "permute", "squeeze", "split", "split_with_sizes", "unbind",
     "unfold", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided", "_reshape_alias")
)  # fmt: skip
REPEATS = 3


class Counting(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class Nobody:
    """A backend that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def write(self, *_: Any) -> None:
        self.asked["page writes"] += 1

    def append_seated(self, *_: Any) -> None:
        self.asked["appends"] += 1

    def attend_seated(self, *_: Any) -> None:
        self.asked["decode attention"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"layers": LAYERS, "kv_heads": H, "repeats": REPEATS}
    for name, prompts in STEPS.items():
        found[name] = {"prompts": prompts, **step(prompts)}
        print(name, found[name], file=sys.stderr, flush=True)
        write_json(arguments.out, found)


def planned() -> PlannedBlocks:
    """The benchmark's plan of 12 % of the bytes."""
    config = {"num_hidden_layers": LAYERS, "num_key_value_heads": H, "head_dim": D}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
        return PlannedBlocks(document(folder).policy, D)


def step(prompts: list[int]) -> dict[str, Any]:
    """One step that reads prompts, and the next one, the least of some repeats."""
    plan = planned()
    each = [plan.blocks(n, n + 64) for n in prompts]
    starts = [1 + sum(each[:at]) for at in range(len(each) + 1)]
    rows = [list(range(a, b)) for a, b in pairwise(starts)]
    places = [sum(prompts[:at]) for at in range(len(prompts) + 1)]
    qkv = [torch.randn(places[-1], heads, D).bfloat16() for heads in (HQ, H, H)]
    out = torch.empty_like(qkv[0])
    first, told = [], {}
    for _ in range(REPEATS):
        backend, copies = Nobody(), Counter[str]()
        engine = Running(plan, torch.device("cpu"), backend, most_room(plan, 64, 4096))
        engine.attach(torch.zeros(16, dtype=torch.int8))
        with Counting() as counting, Copies(copies):
            begun = engine.begin(Table(rows), places, prompts)
            for layer in range(LAYERS):
                engine.attend(begun, layer, tuple(qkv), out, D**-0.5)
        told = {"launches": counting.launches.total(), **copies, **backend.asked}
        at = time.process_time()
        engine.begin(Table(rows), list(range(len(rows) + 1)), [n + 1 for n in prompts])
        first.append(time.process_time() - at)
    launched = told["launches"] + told["page writes"]
    return told | {
        "launches_a_prompt_and_layer": round(launched / len(prompts) / LAYERS, 2),
        "host_ms_before_the_first_answers": round(1e3 * min(first), 2),
    }


class Copies:
    """Counts copies of host tables while prompts are compressed."""

    def __init__(self, told: Counter[str]) -> None:
        self.told, self.call = told, compressing.sent

    def __enter__(self) -> None:
        def noted(*args: Any) -> Any:
            self.told["table copies"] += 1
            return self.call(*args)

        compressing.sent = noted
        self.attention = running.prompt_attention
        # On a GPU attention is one launch, whatever it is made of here.
        running.prompt_attention = lambda q, *_: q.clone()

    def __exit__(self, *_: object) -> None:
        compressing.sent, running.prompt_attention = self.call, self.attention


if __name__ == "__main__":
    main()
