"""Whether plans run inside the memory limit that they were printed for, and what they take.

    python benchmarks/mem_promise.py --out benchmarks/results/mem-promise-h200.json
    python benchmarks/mem_promise.py --tiny --out FILE      # the whole course on a CPU

Random weights in three shapes. A plan's heads draw their options from the packaged plan of its
share (mixed formats, a length of its own for every head). For each limit the largest batch is taken
whose printed peak is within it; the printed batch then reads its prompts and generates all its
tokens in this process, whose allocator is held to the limit. A case that fails is recorded, and the
next one begins. On a CPU tensors are counted as torch makes and frees them, without kernels that
fuse, and nothing lies beside them: the course is tried there, the figures are not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune.__main__ import ALLOCATOR
from kvtune.common.estimate import Estimate
from kvtune.common.units import GIB, MIB
from kvtune.policies.option import Option
from kvtune.policies.paging import Growth, head_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile, detect_gpu, find_gpu
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.device import Bench, CudaBench
from kvtune.runtime.measure.monitor import open_monitor
from kvtune.runtime.promise import run_within
from kvtune.simulator.cost import policy_cost
from kvtune.simulator.memory.peak import overhead_bytes
from kvtune.simulator.memory.plan import memory_plan
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.source_models import packaged_tables

SMALL, MIDDLE, LARGE = "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"


@dataclass(frozen=True)
class Case:
    """One plan and its limit.

    Args:
        model: name of the shape.
        share: of the uncompressed prompt's bytes that the plan's pages take, about; 1 for all.
        prompt_tokens: P.
        new_tokens: of each sequence.
        limit_gib: of the whole process.
    """

    model: str
    share: float
    prompt_tokens: int
    new_tokens: int
    limit_gib: float


CASES = [
    Case(SMALL, 0.12, 7936, 256, 2.0),
    Case(SMALL, 0.06, 1792, 128, 1.5),
    Case(SMALL, 0.25, 7936, 200, 3.0),
    Case(SMALL, 1.0, 1792, 256, 3.0),
    Case(MIDDLE, 0.12, 8192, 256, 5.0),
    Case(MIDDLE, 0.06, 16384, 256, 4.5),
    Case(MIDDLE, 0.25, 4096, 100, 6.0),
    Case(LARGE, 0.12, 16384, 128, 20.0),
    Case(LARGE, 0.06, 32768, 128, 20.0),
    Case(LARGE, 0.25, 8192, 200, 24.0),
    Case(LARGE, 1.0, 8192, 64, 24.0),
]
TINY = ModelShape(
    "tiny", layers=3, query_heads=4, kv_heads=2, head_dim=64, hidden_size=128,
    intermediate_size=512, vocab_size=500, max_context=4096, tied_embeddings=True,
    windows=(None,) * 3,
)  # fmt: skip
TINY_CASES = [
    Case("tiny", 0.12, 600, 8, 8 / 1024),
    Case("tiny", 0.25, 300, 70, 8 / 1024),
    Case("tiny", 1.0, 200, 8, 6 / 1024),
]


def main() -> None:
    asked = _arguments()
    os.environ |= ALLOCATOR  # as the command sets it, before there is a context
    idle = open_monitor(0).used_bytes()  # what the driver and others hold before there is one
    cases = TINY_CASES if asked.tiny else CASES
    bench: Bench = CountingBench() if asked.tiny else CudaBench()
    gpu = find_gpu("h200") if asked.tiny else detect_gpu()
    if gpu is None:
        raise SystemExit("this GPU has no profile, so that nothing is predicted")
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + asked.seconds
    with torch.no_grad():
        for name in dict.fromkeys(case.model for case in cases):
            model = random_model(shape_of(name), max(c.prompt_tokens for c in cases), asked.tiny)
            for case in cases:
                if case.model == name and time.monotonic() < deadline:
                    rows.append(measured(case, model, gpu, bench, asked.tiny))
                    _write(asked.out, gpu, rows, idle, asked.tiny)
            del model
            bench.release()
    print(table(rows, idle))


def measured(case: Case, model: Any, gpu: GpuProfile, bench: Bench, tiny: bool) -> dict[str, Any]:
    """A row: what was printed for a case, and what the run took, or what went wrong."""
    begun = time.perf_counter()
    try:
        row = _row(case, model, gpu, bench, tiny)
    except Exception as error:
        traceback.print_exc()
        row = {"case": asdict(case), "ok": False, "error": f"{type(error).__name__}: {error}"}
    row["wall_s"] = round(time.perf_counter() - begun, 2)
    print(json.dumps(row), file=sys.stderr, flush=True)
    gc.collect()
    return row


def _row(case: Case, model: Any, gpu: GpuProfile, bench: Bench, tiny: bool) -> dict[str, Any]:
    shape, limit = shape_of(case.model), int(case.limit_gib * GIB)
    policy = plan_of(shape, case.share)
    batch = most_within(case, shape, policy, gpu, limit, tiny)
    if batch < 1:
        raise ValueError("not one sequence is said to fit")
    printed = peak_of(case, shape, policy, gpu, batch, tiny)
    device = "cpu" if tiny else "cuda"
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        1, shape.vocab_size, (batch, case.prompt_tokens), generator=generator
    ).to(device)
    found = run_within(policy, model, prompts, case.new_tokens, limit, bench)
    freely = None
    if not found.finished:  # what it would have taken
        freely = asdict(run_within(policy, model, prompts, case.new_tokens, 2 * limit, bench))
    overhead = 0.0 if tiny else overhead_bytes(shape, gpu, "bf16").value
    return {
        "case": asdict(case),
        "batch": batch,
        "printed": printed.as_dict(),
        "run": asdict(found),
        "within_twice_the_limit": freely,
        "process_bytes": found.process_bytes,
        "torch_ratio": found.peak_bytes / (printed.value - overhead),
        "process_ratio": found.process_bytes / printed.value,
        "ok": found.kept,
    }


def plan_of(shape: ModelShape, share: float) -> Policy:
    """Options of the packaged plan of this share, drawn for each head; of 1, everything kept."""
    if share == 1.0:
        return Policy.uniform(Option(), shape.layers, shape.kv_heads, name="uncompressed")
    options = packaged_plan(share)
    drawn = np.random.default_rng(0).integers(len(options), size=(shape.layers, shape.kv_heads))
    heads = tuple(tuple(options[int(n)] for n in row) for row in drawn)
    return Policy(f"{share:.0%} drawn", heads)


@cache
def packaged_plan(share: float) -> Sequence[Option]:
    """One option a head of the model that the package was measured on; pages are what is priced."""
    tables, _ = packaged_tables()
    tokens, head_dim = tables.prompt_tokens, tables.head_dim
    held = [
        head_bytes(o, o.budget.resolve(tokens), tokens, head_dim, Growth(0)) for o in tables.options
    ]
    problem = Problem.of(tables.of_split("search"), np.array(held, np.int64))
    choice = solve(problem, int(share * 4 * tables.heads * head_dim * tokens))
    return [tables.options[int(n)] for n in choice]


def peak_of(
    case: Case, shape: ModelShape, policy: Policy, gpu: GpuProfile, batch: int, tiny: bool
) -> Estimate:
    """The peak that ``kvtune estimate`` and ``kvtune search`` print; tensors alone on a CPU."""
    budget = memory_plan(
        shape, gpu, gpu.visible_bytes, context_tokens=case.prompt_tokens,
        generated_tokens=case.new_tokens, weights="bf16",
    )  # fmt: skip
    printed = policy_cost(policy, budget.at(batch)).memory
    if not tiny:
        return printed
    beside = overhead_bytes(shape, gpu, "bf16")
    value, low, high = (
        getattr(printed, end) - getattr(beside, end) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, "B", "assumed")


def most_within(
    case: Case, shape: ModelShape, policy: Policy, gpu: GpuProfile, limit: int, tiny: bool
) -> int:
    """Sequences whose printed peak is within the limit."""
    batch, step = 0, 1 << 12
    while step:
        if peak_of(case, shape, policy, gpu, batch + step, tiny).value <= limit:
            batch += step
        step //= 2
    return batch


def shape_of(name: str) -> ModelShape:
    return TINY if name == "tiny" else find_model(name)


def random_model(shape: ModelShape, context: int, tiny: bool) -> Any:
    """Llama's own code with random weights in the shape."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size, tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=2 * context,
    )  # fmt: skip
    torch.manual_seed(0)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cpu" if tiny else "cuda"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(standard)


class Counting(TorchDispatchMode):
    """Bytes of tensors from when torch makes them until nothing holds them, within a limit."""

    def __init__(self, limit: int, held: int) -> None:
        super().__init__()
        self.limit, self.used, self.peak = limit, held, held
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.device.type == "cpu":
                self._take(each, args)
        return found

    def _take(self, tensor: Tensor, args: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        if key in self._known or key in given or not size:
            return
        if self.used + size > self.limit:
            raise torch.OutOfMemoryError("out of memory, as the limit says")
        self._known.add(key)
        self.used += size
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._give, key, size)

    def _give(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.used -= size


class CountingBench:
    """A CPU as a bench: its memory is what ``Counting`` counts."""

    def __init__(self) -> None:
        self.counting: Counting | None = None

    def seconds(self, call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def forget_peak(self) -> None:
        gc.collect()

    release = forget_peak

    def look(self) -> None:
        """Does nothing: a CPU has no second source of memory figures."""

    def peak_bytes(self) -> int:
        return self.counting.peak if self.counting else 0

    def reserved_bytes(self) -> int:
        return self.peak_bytes()

    def device_bytes(self) -> int | None:
        return None

    def available_bytes(self) -> int:
        return 0

    def outside_bytes(self) -> int:
        return 0

    @contextmanager
    def capped(self, limit_bytes: int) -> Iterator[int]:
        """From the tensors that are there now, weights among them."""
        gc.collect()
        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if isinstance(each, Tensor)
        }
        self.counting = Counting(limit_bytes, sum(storages.values()))
        with self.counting:
            yield 0


def table(rows: Sequence[dict[str, Any]], idle: int | None) -> str:
    """For people; NVML's figure is beyond what was in use before the run."""
    lines = [
        "model         share      P  new batch limit printed [interval] torch process NVML ratio ok"
    ]
    for row in rows:
        case = row["case"]
        start = (
            f"{case['model']:14} {case['share']:5} {case['prompt_tokens']:6} {case['new_tokens']:4}"
        )
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        run, said = row["run"], row["printed"]
        nvml = "-" if run["device_bytes"] is None else _gib(run["device_bytes"] - (idle or 0))
        lines.append(
            f"{start} {row['batch']:6} {_gib(run['limit_bytes'])} {_gib(said['value'])} "
            f"[{', '.join(map(_gib, said['interval']))}] {_gib(run['peak_bytes'])} "
            f"{_gib(row['process_bytes'])} {nvml} {row['torch_ratio']:.3f} {row['ok']}"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size > 100 * MIB else f"{size / GIB:.5f}"


def _write(
    path: Path, gpu: GpuProfile, rows: Sequence[dict[str, Any]], idle: int | None, tiny: bool
) -> None:
    """After every case, so that what was measured is kept."""
    kept = sum(row["ok"] for row in rows)
    near = [abs(row["torch_ratio"] - 1) for row in rows if "torch_ratio" in row]
    answer = {
        "gpu": "cpu" if tiny else gpu.slug,
        "torch": torch.__version__,
        "nvml_idle_bytes": idle,
        "within_limit": f"{kept} of {len(rows)}",
        "largest_error_of_torch_peak": max(near, default=None),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--seconds", type=float, default=600, help="no case begins after them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
