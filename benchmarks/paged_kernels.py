"""The runtime's kernels on a GPU: right first, then fast, beside what torch has.

    python benchmarks/paged_kernels.py --out kernels.json [--seconds 240]

Every kernel is checked against a float64 reference, beside torch's own error; then timed cold, in
CUDA graphs over rotating buffers, against SDPA's flash and cuDNN backends, FlexAttention, and
FlashInfer and FlashAttention where they can be imported. Results are written as they come; when
the time is up, what is left is skipped and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flashinfer_peer
import paged
import torch
import torch.nn.functional as F
from paged import DEVICE, Layer, Run, make_layer, time_s, uniform
from paged_checks import GROUP, HEAD_DIM, ROWS, cases
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvtune.policies.pages import exact_tokens, layout_of
from kvtune.policies.policy_file.reader import read_policy
from kvtune.runtime.kernels.launch import Shape

BATCH, KV_HEADS = 8, ROWS // 8
MB = 1e6
SIZES_MB = (16, 64, 128, 256, 512, 1024)
PLAN = Path(__file__).with_name("plans") / "llama-8b-32k-12-percent.yaml"
SHAPES = (Shape(1, 2), Shape(1, 3), Shape(1, 4))
PROGRAMS = (396, 528, 792, 1056, 1584, 2112)
COMPILERS = 12  # processes; each takes a context on the GPU


class Results:
    """Written to a file whenever something is added; knows when to stop."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.deadline, self.begun = out, time.monotonic() + seconds, time.monotonic()
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter",
            "torch": torch.__version__,
        }

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.out.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        print(f"{time.monotonic() - self.begun:6.1f} s  {name}: {json.dumps(value)}", flush=True)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @contextmanager
    def part(self, name: str, needs_s: float = 5) -> Iterator[bool]:
        """A part of the benchmark, whose failure is recorded and does not end the run."""
        try:
            if self.left_s() < needs_s:
                self.add(f"{name} skipped", "no time")
            yield self.left_s() >= needs_s
        except Exception as error:
            self.add(f"{name} failed", f"{type(error).__name__}: {error}"[-1500:])
            traceback.print_exc()


def check_everything(results: Results) -> None:
    for name, case in cases().items():
        with results.part(name) as go:
            if go:
                results.add(f"check {name}", case())


def tokens_of(megabytes: float) -> int:
    """Tokens a row of bf16 that take so much."""
    return round(megabytes * MB / (4 * HEAD_DIM * ROWS))


def layers_of(runs: list[Run], programs: int | None = None) -> list[Layer]:
    first = make_layer(runs, ROWS, GROUP, HEAD_DIM, programs)
    more = paged.copies(first.payload_bytes) - 1
    return [first, *(make_layer(runs, ROWS, GROUP, HEAD_DIM, programs) for _ in range(more))]


def ours_s(runs: list[Run]) -> tuple[float, int]:
    """Seconds, and bytes read."""
    layers = layers_of(runs)
    return time_s(paged.attention_calls(layers)), layers[0].payload_bytes


def tune(results: Results) -> None:
    """How to compile and how finely to cut: uniform layers small and large, and a plan's."""
    cases = {
        "bf16 16 MB": uniform(ROWS, tokens_of(16)),
        "int4 16 MB": uniform(ROWS, tokens_of(16), "int4"),
        "bf16 256 MB": uniform(ROWS, tokens_of(256)),
        "int4 256 MB": uniform(ROWS, tokens_of(256), "int4"),
        "fp8 256 MB": uniform(ROWS, tokens_of(256), "fp8"),
        **{f"plan's layer {n}": plan_layer(n) for n in (20, 4, 14, 8, 11, 0)},
    }
    variants = [(pairs_of(runs), shape) for runs in cases.values() for shape in SHAPES]
    with results.part("compiling", needs_s=30) as go:
        if go:
            results.add("compiled ahead, s", compile_ahead(list(dict.fromkeys(variants))))
    for name, runs in cases.items():
        table: dict[str, float] = {}
        for programs in PROGRAMS:
            layers = layers_of(runs, programs)
            for shape in SHAPES:
                with results.part(f"{name} {shape}", needs_s=8) as go:
                    if go:
                        taken = time_s(paged.attention_calls(layers, shape), 0.01)
                        table[f"{shape}, {programs} programs"] = round(1e6 * taken, 2)
        results.add(f"tuning {name}, us", dict(sorted(table.items(), key=lambda item: item[1])))


def pairs_of(runs: list[Run]) -> tuple[tuple[str, str], ...]:
    """The formats that occur."""
    return tuple(sorted({(run.keys, run.values) for run in runs}))


def compile_ahead(variants: list[tuple[tuple[tuple[str, str], ...], Shape]]) -> float:
    """Seconds that it took to fill Triton's cache, several variants at once."""
    begun = time.monotonic()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=spawned) as pool:
        list(pool.map(compile_one, variants))
    return round(time.monotonic() - begun, 1)


def compile_one(variant: tuple[tuple[tuple[str, str], ...], Shape]) -> None:
    pairs, shape = variant
    runs = [Run(row, *pairs[row % len(pairs)], 100) for row in range(ROWS)]
    layer = make_layer(runs, ROWS, GROUP, HEAD_DIM)
    paged.attention_calls([layer], shape)[0]()
    torch.cuda.synchronize()


def plan_layer(layer: int) -> list[Run]:
    policy = read_policy(PLAN).bind(32, KV_HEADS)
    return plan_runs(policy.heads[layer], policy.budgets(32768)[layer].tolist() * BATCH)


def peers(tokens: int, flex: bool) -> dict[str, Callable[[], float]]:
    """What else there is, as functions that time it on the same bytes."""
    shape = (BATCH, KV_HEADS, tokens, HEAD_DIM)
    number = paged.copies(4 * HEAD_DIM * ROWS * tokens)

    def buffers() -> list[tuple[Tensor, Tensor, Tensor]]:
        def one(s: tuple[int, ...]) -> Tensor:
            return torch.randn(s, device=DEVICE, dtype=torch.bfloat16)

        q = (BATCH, KV_HEADS * GROUP, 1, HEAD_DIM)
        return [(one(q), one(shape), one(shape)) for _ in range(number)]

    def timed(call: Callable[[Tensor, Tensor, Tensor], object]) -> float:
        return time_s([lambda t=t: call(*t) for t in buffers()])  # type: ignore[misc]

    def sdpa(backend: Any) -> float:
        with sdpa_kernel(backend):
            return timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    def sdpa_rows(backend: Any) -> float:
        with sdpa_kernel(backend):
            return timed(
                lambda q, k, v: F.scaled_dot_product_attention(
                    q.view(BATCH, KV_HEADS, GROUP, HEAD_DIM), k, v
                )
            )

    def flex_attention() -> float:
        from torch.nn.attention.flex_attention import flex_attention as function

        compiled = torch.compile(function, dynamic=False)
        return timed(lambda q, k, v: compiled(q, k, v, enable_gqa=True))

    found = {
        "sdpa flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa flash, group as rows": lambda: sdpa_rows(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa cudnn, group as rows": lambda: sdpa_rows(SDPBackend.CUDNN_ATTENTION),
    }
    if flex:
        found["flex attention"] = flex_attention
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        found["flash_attn"] = lambda: timed(
            lambda q, k, v: flash_attn_with_kvcache(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            )
        )
    asked = flashinfer_peer.Decode(BATCH, KV_HEADS, GROUP, HEAD_DIM, tokens)
    return found | flashinfer_peer.peers(asked)


def against_peers(results: Results) -> None:
    with results.part("FlashInfer's errors") as go:
        if go:
            asked = flashinfer_peer.Decode(2, KV_HEADS, GROUP, HEAD_DIM, 1000)
            results.add("FlashInfer's error against float64", flashinfer_peer.errors(asked))
    for megabytes in SIZES_MB:
        tokens = tokens_of(megabytes)
        size = 4 * HEAD_DIM * ROWS * tokens
        rates = {"ours": size / ours_s(uniform(ROWS, tokens))[0] / 1e9}
        for name, measure in peers(tokens, flex=megabytes in {16, 256}).items():
            with results.part(f"{name} at {megabytes} MB") as go:
                if go:
                    rates[name] = size / measure() / 1e9
        others = [rate for name, rate in rates.items() if name != "ours"]
        share = rates["ours"] / max(others) if others else None
        results.add(f"bf16 {megabytes} MB, GB/s", {**rates, "share of best peer": share})


def formats(results: Results) -> None:
    for megabytes in (16, 64, 256, 1024):
        tokens = tokens_of(megabytes)
        base = ours_s(uniform(ROWS, tokens))[0]
        found: dict[str, Any] = {"bf16 us": 1e6 * base}
        for pair in (
            ("int4", "int4"),
            ("int4-token", "int4"),
            ("fp8", "fp8"),
            ("int4", "int2"),
            ("int8", "int8"),
            ("int2", "int2"),
        ):
            with results.part(f"{pair} at {megabytes} MB") as go:
                if go:
                    taken, size = ours_s(uniform(ROWS, tokens, *pair))
                    found["/".join(pair)] = {
                        "us": 1e6 * taken, "faster": base / taken, "GB/s": size / taken / 1e9,
                    }  # fmt: skip
        results.add(f"formats at {megabytes} MB of bf16", found)


def ragged(results: Results) -> None:
    """Lengths of a tuned plan's layers, in bf16 beside uniform ones, then in their own formats."""
    policy = read_policy(PLAN).bind(32, KV_HEADS)
    budgets = policy.budgets(32768)
    spread = budgets.std(1) / budgets.mean(1)
    for layer in sorted(range(len(budgets)), key=lambda n: -spread[n])[:6]:
        with results.part(f"ragged layer {layer}") as go:
            if not go:
                break
            lengths = budgets[layer].tolist() * BATCH
            mean = round(sum(lengths) / ROWS)
            runs = [Run(row, "bf16", "bf16", n) for row, n in enumerate(lengths)]
            ours = ours_s(runs)[0]
            even = ours_s(uniform(ROWS, mean))[0]
            stored, size = ours_s(plan_runs(policy.heads[layer], lengths))
            results.add(
                f"ragged, layer {layer}",
                {
                    "tokens": budgets[layer].tolist(), "MB as bf16": mean * ROWS * 512 / MB,
                    "bf16 us": 1e6 * ours, "uniform us": 1e6 * even, "ratio": ours / even,
                    "in its formats us": 1e6 * stored, "MB": size / MB, "GB/s": size / stored / 1e9,
                },
            )  # fmt: skip


def plan_runs(options: Any, lengths: list[int]) -> list[Run]:
    """A plan's layer with 100 generated tokens a head, as the runtime lays it out."""
    runs = []
    for row, tokens in enumerate(lengths):
        option = options[row % KV_HEADS]
        exact = min(exact_tokens(option.keys), tokens)
        layout = layout_of(option, HEAD_DIM)
        runs.append(Run(row, layout.keys, layout.values, tokens - exact))
        runs.append(Run(row, "bf16", "bf16", exact + 100))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--parts", nargs="*", help="check, tune, formats, ragged, peers; all")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = Results(arguments.out, arguments.seconds)
    parts = {"tune": tune, "formats": formats, "ragged": ragged, "peers": against_peers}
    for name in arguments.parts or ["check", *parts]:
        with results.part(name) as go:
            if go:
                {"check": check_everything, **parts}[name](results)


if __name__ == "__main__":
    main()
