"""Steps of vLLM's scheduler over a trace's lengths: what is lost where prompts take every block.

    python benchmarks/vllm_admission.py --out FILE

A plan holds prompts in few blocks, and answers grow in 16 bits. A scheduler that gives its last
blocks to new prompts soon preempts requests that run, which are then read again. The plan of
``vllm_gpu.py`` is served here by arithmetic alone, with several shares of the memory left to those
that run, beside the same without a plan. A step takes as long as the H200 took
(``results/vllm-gpu-graphs-h200.json``): so much anyway, a request that generates, and a token that
is read. The steps without a share left are those that were measured, to a few per cent, which the
output shows side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from vllm_gpu import SHAPES, TIGHT_GIB, fitting_lengths
from vllm_plugin import LONGEST, document

from kvtune.common.files import write_json
from kvtune.runtime.serving.blocks import PlannedBlocks

MEASURED = Path(__file__).parent / "results" / "vllm-gpu-graphs-h200.json"
MEMORY_GIB, SECONDS, REQUESTS, AT_ONCE = 4.0, 20.0, 1000, 256
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2)
STEP_MS = {"stock": (5.4, 0.035, 0.026), "plan": (5.0, 0.034, 0.027)}
"""Of a step, of each request that generates, of each token that is read: the two first from median
steps of eight and of many, the last from what is left of the seconds of a load."""

Blocks = Callable[[int, int], int]


@dataclass(eq=False)
class Request:
    """A request of the trace while it is served.

    Args:
        prompt: tokens that it is to read, its answer so far included.
        answer: tokens that it is still to generate.
        said: tokens that it has generated since it was read.
        blocks: that it holds.
        again: whether it was read before.
    """

    prompt: int
    answer: int
    said: int = 0
    blocks: int = 0
    again: bool = False


@dataclass
class Server:
    """Requests of a step, the youngest preempted first.

    Args:
        blocks: of a request, by its prompt and all of its tokens.
        free: blocks that nobody has.
        left: share of the blocks that a new request leaves to those that run.
    """

    blocks: Blocks
    free: int
    left: float
    waiting: list[Request]
    running: list[Request] = field(default_factory=list)
    preempted: int = 0
    read_again: int = 0

    def __post_init__(self) -> None:
        self.kept = int(self.left * self.free)

    def grow(self) -> None:
        """Give every request that runs room for one more token."""
        for request in list(self.running):
            while request in self.running:
                wanted = self.blocks(request.prompt, request.prompt + request.said + 1)
                if wanted - request.blocks <= self.free:
                    self.take(request, wanted)
                    break
                self.preempt(self.running.pop())

    def admit(self) -> list[Request]:
        """Requests that read their prompts in this step."""
        new, budget = list[Request](), LONGEST - len(self.running)
        while self.waiting and len(self.running) + len(new) < AT_ONCE:
            request = self.waiting[-1]
            wanted = self.blocks(request.prompt, request.prompt)
            kept = self.kept if self.running or new else 0
            if request.prompt > budget or wanted + kept > self.free:
                break
            self.take(request, wanted)
            new.append(self.waiting.pop())
            budget -= request.prompt
        self.read_again += sum(request.prompt for request in new if request.again)
        return new

    def take(self, request: Request, blocks: int) -> None:
        self.free -= max(0, blocks - request.blocks)
        request.blocks = max(blocks, request.blocks)

    def preempt(self, request: Request) -> None:
        self.free += request.blocks
        self.preempted += 1
        prompt, answer = request.prompt + request.said, request.answer - request.said
        self.waiting.append(Request(prompt, answer, again=True))

    def say(self) -> int:
        """A token of every request; those that have ended leave. Returns how many ended."""
        for request in self.running:
            request.said += 1
        ended = [request for request in self.running if request.said >= request.answer]
        self.free += sum(request.blocks for request in ended)
        self.running = [request for request in self.running if request.said < request.answer]
        return len(ended)


def served(blocks: Blocks, free: int, left: float, step_ms: tuple[float, ...]) -> dict[str, Any]:
    """What a load comes to in ``SECONDS``."""
    lengths = islice(cycle(fitting_lengths()), REQUESTS)
    server = Server(blocks, free, left, [Request(*each) for each in lengths][::-1])
    anyway, each, token = step_ms
    time = 0.0
    steps = ended = generated = most = 0
    while time < SECONDS:
        server.grow()
        generating = len(server.running)
        new = server.admit()
        read = sum(request.prompt for request in new)
        time += (anyway + each * generating + token * read) / 1e3
        server.running += new
        most, steps = max(most, len(server.running)), steps + 1
        generated += len(server.running)
        ended += server.say()
    return {
        "generated_a_second": round(generated / time), "ended_a_second": round(ended / time, 2),
        "steps": steps, "most_at_once": most, "preempted": server.preempted,
        "tokens_read_again": server.read_again,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES["8b"] | {"head_dim": 128}))
        planned = PlannedBlocks(document(folder).policy, 128)
    measured = json.loads(MEASURED.read_text("utf-8"))
    stock_bytes = 16 * 2 * 2 * 128 * 8 * 32
    counts: dict[str, tuple[Blocks, int]] = {
        "stock": (lambda _, tokens: -(-tokens // 16), stock_bytes),
        "plan": (planned.blocks, planned.block_bytes),
    }
    found: dict[str, Any] = {"seconds": SECONDS, "memory_gib": MEMORY_GIB, "step_ms": STEP_MS}
    for load, memory in (("short", MEMORY_GIB), ("tight", TIGHT_GIB)):
        for name, (blocks, block_bytes) in counts.items():
            free = int(memory * 2**30 / block_bytes)
            told = {str(share): served(blocks, free, share, STEP_MS[name]) for share in SHARES}
            known = measured[name][load]
            told_there = {key: known[key] for key in told["0.0"] if key in known}
            found[f"{load}, {name}"] = {"measured, nothing left": told_there, **told}
            print(load, name, json.dumps(found[f"{load}, {name}"], indent=1))
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
