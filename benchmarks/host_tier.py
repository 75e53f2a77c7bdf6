"""A context of 130k tokens of the 8B shape in 16 GB, most of it in the host's memory.

    python benchmarks/host_tier.py --out benchmarks/results/host-tier-h200.json [--seconds 240]
    python benchmarks/host_tier.py --device cpu --tiny --out FILE     # that it runs

Random weights: matrices in four bits that are stored and multiplied so, embeddings in bf16. The
process is held to 16 GB, its context included. Every head's prompt lies on the host, and a step
brings over the pages that Quest selects. ``answers``: a small model draws the same tokens with its
heads on the host and on the device. ``copies``: plain copies from the host by size. ``parts``: what
``kvtune profile`` measures of choosing, fetching and joining, alone. ``matrices``: this model's
four-bit matrices, alone. Of these parts and of the card's profile each token's time is predicted
(``predicted_token_s``), before a long context has run. ``predicted_by_profile_s`` takes the
matrices as the profile has them, whose four-bit kernels are others than this benchmark's own.
Then a prompt is really read, and tokens are really generated as a CUDA graph. Keys and queries of
random weights are nearly unrelated: what a selection finds there says nothing of a trained model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int4_linear import Int4Linear, in_four_bits
from recorded_parts import attempt, say
from timed_graph import captured_call
from torch import Tensor
from transformers import LlamaConfig

from kvtune.__main__ import ALLOCATOR
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.host_pages import host_sequence_bytes
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.option import Budget, Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.kernel_table import KernelRow
from kvtune.profiles.measured import find_measured
from kvtune.profiles.models import find_model
from kvtune.profiles.shape import ModelShape
from kvtune.runtime import load_cache
from kvtune.runtime.admission import read_prompts
from kvtune.runtime.device import CudaBench
from kvtune.runtime.graph import DecodeLoop, generate
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.measure.grid import FULL
from kvtune.runtime.measure.operation import Setting
from kvtune.runtime.measure.ops.host_heads import OPERATIONS
from kvtune.runtime.measure.runner import Bench
from kvtune.runtime.measure.runner import timed as timed_row
from kvtune.runtime.measure.timer import capture, cuda_timer
from kvtune.simulator.cost import policy_cost
from kvtune.simulator.latency.host import host_step
from kvtune.simulator.latency.kernels import Kernels
from kvtune.simulator.latency.parts import matrix_products
from kvtune.simulator.latency.steps import decode_step
from kvtune.simulator.latency.terms import matrices_in_format
from kvtune.simulator.latency.transfer import tables_for
from kvtune.simulator.memory.plan import memory_plan
from kvtune.simulator.memory.policy_bytes import bytes_read_by_format

MODEL, LIMIT_BYTES = "llama-3.1-8b", 16 * 10**9
CONTEXT, NEW_TOKENS = 130_048, 256
BUDGETS = (2048, 4096, 1024)


def options(tokens: int) -> dict[str, Option]:
    """What a step reads of each head, in bf16 and in four bits."""
    reader, budget = Quest(block=PAGE), Budget(tokens=tokens)
    return {
        "bf16": Option(reader, budget, tier="host"),
        "int4": Option(reader, budget, Int4(), Int4(), tier="host"),
    }


def config_of(name: str, context: int) -> LlamaConfig:
    shape = find_model(name)
    return LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab_size,
        max_position_embeddings=context, rope_theta=500000.0,
    )  # fmt: skip


def answers(device: str, prompt: int, new: int) -> dict[str, Any]:
    """Tokens that a small model draws with its heads on the host and on the device, in a graph."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=1000, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = in_four_bits(config, device)
    ids = torch.randint(1, 1000, (2, prompt), device=device)
    found: dict[str, Any] = {}
    for name, there in options(prompt // 3).items():
        drawn = []
        for option in (there, replace(there, tier="device")):
            cache = load_cache(Policy.uniform(option, 4, 2), model, new_tokens=new)
            drawn.append(generate(model, cache, ids, new_tokens=new))
        found[name] = {
            "captured": cache.can_be_captured,
            "equal": int((drawn[0] == drawn[1]).sum()),
            "of": drawn[0].numel(),
        }
    return found


@dataclass(frozen=True)
class Parts:
    """What was measured alone before a token's time is predicted.

    Args:
        kernels: of the card's profile, and a layer's with heads on the host.
        matrices_s: of one token through all of the model's matrices.
    """

    kernels: Kernels | None = None
    matrices_s: float | None = None


def predicted(
    policy: Policy, shape: ModelShape, context: int, new: int, parts: Parts
) -> dict[str, Any]:
    """A token's time and the peak on this card, before anything has run."""
    gpu = find_gpu("h200")
    asked = {"context_tokens": context, "generated_tokens": new, "weights": "int4"}
    budget = memory_plan(shape, gpu, None, **asked)  # type: ignore[arg-type]
    cost = policy_cost(policy, budget)
    read = dict(bytes_read_by_format(policy, shape, context) + Counter(bf16=1))
    profiled = decode_step(shape, gpu, "int4", 1, read, "runtime")
    added = host_step(policy, shape, gpu, 1, context, parts.kernels)
    step = {end: getattr(profiled, end) + getattr(added, end) for end in ("value", "low", "high")}
    matrices = {end: profiled_matrices(shape, end) for end in step}
    return {
        "predicted_token_s": step
        if parts.matrices_s is None
        else {end: step[end] - matrices[end] + parts.matrices_s for end in step},
        "predicted_by_profile_s": step,
        "predicted_matrices_s": matrices,
        "predicted_of_the_host_s": added.as_dict(),
        "predicted_peak_bytes": cost.memory.as_dict(),
    }


def profiled_matrices(shape: ModelShape, end: str) -> float:
    """Seconds of one token through matrices in four bits, by the card's profile."""
    gpu, one = find_gpu("h200"), np.ones(1)
    tables = tables_for(gpu)
    assert tables is not None
    head = tables.kernels.linear(shape.vocab_size, shape.hidden_size, one)
    whole = shape.layers * matrix_products(tables.kernels, shape, one) + head
    return float(matrices_in_format(whole, shape, gpu, "int4", one, end)[0])


def paper() -> dict[str, Any]:
    """RetrievalAttention's 0.188 s a token at 128k on an RTX 4090 (arXiv 2409.10516), predicted.

    16-bit weights of the 8B shape; 128 and 512 tokens that are always read and 100 that are found.
    """
    shape, gpu, tokens = find_model(MODEL), find_gpu("4090"), 131_072
    option = Option(RetrievalAttention(), Budget(tokens=740), tier="host")
    policy = Policy.uniform(option, shape.layers, shape.kv_heads)
    read = dict(bytes_read_by_format(policy, shape, tokens) + Counter(bf16=1))
    step = decode_step(shape, gpu, "bf16", 1, read, "runtime")
    added = host_step(policy, shape, gpu, 1, tokens)
    return {
        "published_s": 0.188,
        "predicted_s": {
            end: getattr(step, end) + getattr(added, end) for end in ("value", "low", "high")
        },
        "of_the_host_s": added.as_dict(),
    }


def copies(device: str) -> list[dict[str, float]]:
    """Plain copies out of pinned memory, launched one by one."""
    found = []
    for power in (16, 20, 22, 23, 24, 25) if device == "cuda" else (16,):
        host = torch.zeros(2**power, dtype=torch.uint8, pin_memory=device == "cuda")
        there = torch.zeros(2**power, dtype=torch.uint8, device=device)
        taken = timed(lambda h=host, t=there: t.copy_(h, non_blocking=True), device)
        found.append({"bytes": 2**power, "us": 1e6 * taken, "GB_per_s": 2**power / taken / 1e9})
    return found


def measured_rows(device: str) -> list[KernelRow]:
    """The profile's own measurement of the ops of heads on the host."""
    if device == "cpu":
        return []
    bench = Bench(find_gpu("h200"), Setting(device, FULL), cuda_timer, torch.__version__)
    rows = []
    for operation in OPERATIONS:
        for wanted in operation.points(FULL):
            rows.append(timed_row(operation, wanted.point, bench))
            say(operation.name, wanted.point.length, wanted.point.width_in, rows[-1].median_us)
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def kernels_with(rows: list[KernelRow]) -> Kernels | None:
    """The card's profile with these rows."""
    known = find_measured("h200")
    if not rows or known is None:
        return None
    names = {row.point.op for row in rows}
    return Kernels([*(row for row in known.rows if row.point.op not in names), *rows])


def timed(call: Any, device: str, times: int = 20) -> float:
    """Seconds of one call, the median of several."""
    taken = []
    for _ in range(times):
        finish(device)
        begun = time.perf_counter()
        call()
        finish(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[times // 4 :])


def repeated(call: Any, times: int) -> Any:
    def again() -> None:
        for _ in range(times):
            call()

    return again


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Long:
    """A model of random weights, read and asked under a limit."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.longest = device, 700 if tiny else CONTEXT
        self.name = "llama-3.2-1b" if tiny else MODEL
        self.new = 8 if tiny else NEW_TOKENS
        torch.manual_seed(0)
        begun = time.monotonic()
        config = config_of(self.name, self.longest + self.new)
        if tiny:
            config.num_hidden_layers, config.vocab_size = 2, 1000
        self.model = in_four_bits(config, device)
        self.shape = replace(
            find_model(self.name), layers=config.num_hidden_layers,
            windows=(None,) * config.num_hidden_layers,
        )  # fmt: skip
        finish(device)
        say("model", f"{time.monotonic() - begun:.0f} s")
        self.ids = torch.randint(1, config.vocab_size, (1, self.longest), device=device)
        self.parts = Parts()

    @torch.no_grad()
    def matrices(self) -> dict[str, float]:
        """Seconds of a token through all matrices, one after another in one graph."""
        inputs: dict[int, Tensor] = {}
        for module in self._matrices():
            size = module.in_features
            inputs[size] = torch.randn(1, 1, size, device=self.device, dtype=torch.bfloat16)

        def run() -> None:
            for module in self._matrices():
                module(inputs[module.in_features])

        if self.device == "cpu":
            return {"seconds": timed(run, self.device, 2)}
        replay = capture(run)
        return {
            "seconds": timed(repeated(replay, 4), self.device) / 4,
            "int4_bytes": sum(
                m.packed.nbytes + m.scales.nbytes
                for m in self._matrices()
                if isinstance(m, Int4Linear)
            ),
            "bf16_bytes": self.model.lm_head.weight.nbytes,
        }

    def _matrices(self) -> list[Any]:
        kinds = Int4Linear, torch.nn.Linear
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def case(self, option: Option, context: int | None = None) -> dict[str, Any]:
        """One plan, from the prompt to the last token."""
        self.context = context or self.longest
        policy = Policy.uniform(option, self.shape.layers, self.shape.kv_heads)
        growth = Growth(self.new)
        head_dim = self.shape.head_dim
        found: dict[str, Any] = {
            "plan": option.label,
            "context": self.context,
            "layers": self.shape.layers,
            "planned_device_cache_bytes": sequence_bytes(policy, self.context, head_dim, growth),
            "planned_host_bytes": host_sequence_bytes(policy, self.context, head_dim),
            "moved_bytes_a_step": policy.moved_bytes(self.context, head_dim),
            "read_bytes_a_step": policy.read_bytes(self.context, head_dim),
            "full_cache_bytes": self.shape.kv_bytes(self.context),
        }
        found |= predicted(policy, self.shape, self.context, self.new, self.parts)
        bench = CudaBench() if self.device == "cuda" else None
        if bench:
            bench.release()
        with bench.capped(LIMIT_BYTES) if bench else nullcontext(0) as outside:
            found |= self._run(policy)
            if bench:
                found["outside_bytes"] = outside
                found["reserved_bytes"] = bench.reserved_bytes()
                found["process_bytes"] = outside + bench.reserved_bytes()
                found["within_16_GB"] = found["process_bytes"] <= LIMIT_BYTES
            found["measured_over_predicted"] = (
                found["token_s"] / found["predicted_token_s"]["value"]
            )
        if bench:
            bench.release()
        return found

    @torch.no_grad()
    def _run(self, policy: Policy) -> dict[str, Any]:
        cache = load_cache(policy, self.model, new_tokens=self.new)
        begun = time.monotonic()
        first = read_prompts(self.model, cache, self.ids[:, : self.context]).argmax(-1)
        finish(self.device)
        read_s = time.monotonic() - begun
        place = torch.full_like(first, self.context)
        loop = DecodeLoop(self.model, cache, first, place, self.new)
        steps, per = [], 4 if self.device == "cpu" else 16
        with loop.ready():
            loop.advance(min(8, self.new - loop.done) if self.device == "cuda" else 1)
            while loop.done + per <= self.new:
                finish(self.device)
                begun = time.perf_counter()
                loop.advance(per)
                finish(self.device)
                steps.append((time.perf_counter() - begun) / per)
        return {
            "prompt_s": read_s,
            "token_s": statistics.median(steps),
            "token_s_all": steps,
            "graph": cache.can_be_captured,
            "host_bytes": cache.host_bytes(),
            "host_held_bytes": cache.host_pool.held_bytes if cache.host_pool else 0,
            "device_page_bytes": cache.page_bytes(),
        } | (
            {"parts_s": self._parts(cache), "selection": self._selection(cache)}
            if policy.uses_host
            else {}
        )

    def _parts(self, cache: Any) -> dict[str, float]:
        """Seconds of one layer's choosing and fetching, alone, and of its whole attention."""
        layer = cache.layers[0].paged
        rows, group = layer.rows, self.shape.query_heads // self.shape.kv_heads
        dtype = torch.bfloat16
        q = torch.randn(rows, group, self.shape.head_dim, device=self.device, dtype=dtype)
        arrival = layer.host.arrivals[0]
        fetching, _ = arrival.choose(q)
        memory = cache.pool.memory
        parts = {
            "choose": lambda: arrival.choose(q),
            "fetch": lambda: layer.backend.fetch(memory, cache.host_pool, fetching),
        }
        if self.device == "cpu":
            return {name: timed(call, self.device) for name, call in parts.items()}
        scratch = Scratch(rows, layer.slots, group, self.shape.head_dim, self.device)
        parts["attention, with both"] = lambda: layer.attend(q, scratch, 0.1)
        return {
            name: timed(repeated(captured_call(call), 20), self.device) / 20
            for name, call in parts.items()
        }

    def _selection(self, cache: Any) -> list[dict[str, float]]:
        """Share of attention on the selected pages' tokens, beside their share of all tokens.

        Of bf16 pages, in which keys lie token by token; for queries that look like the first key.
        """
        found = []
        for number in (0, len(cache.layers) - 1):
            layer = cache.layers[number].paged
            arrival = layer.host.arrivals[0]
            if arrival.layout != PageLayout(self.shape.head_dim):
                return []
            group = self.shape.query_heads // self.shape.kv_heads
            keys = self._keys(layer.host, 0, int(arrival.indexed.counts[0]))
            for kind, query in {
                "random queries": torch.randn_like(keys[:group]),
                "queries near a key": 3 * keys[len(keys) // 3].expand(group, -1),
            }.items():
                q = query.to(torch.bfloat16).expand(layer.rows, group, -1).contiguous()
                chosen, _ = arrival.indexed.choose(q[arrival.at], arrival.cells.shape[1])
                token = (PAGE * chosen[0, :, None] + torch.arange(PAGE, device=q.device)).flatten()
                weights = (query @ keys.T * self.shape.head_dim**-0.5).softmax(-1).mean(0)
                token = token[token < len(keys)].unique()
                best = weights.topk(len(token)).values.sum()
                found.append(
                    {
                        "layer": number, "queries": kind, "tokens_read": len(token) / len(keys),
                        "attention_read": float(weights[token].sum()),
                        "attention_of_the_best_tokens": float(best),
                    }
                )  # fmt: skip
        return found

    def _keys(self, host: Any, row: int, count: int) -> Tensor:
        """A row's keys on the device, ``[n, D]`` float32: the first half of pages of 16 bits."""
        layout = PageLayout(self.shape.head_dim)
        blocks = [host.pool.view(place, layout.block_bytes) for place in host.blocks[row].tolist()]
        pages = torch.stack(blocks).to(self.device).view(-1, layout.page_bytes)
        keys = pages[:, : layout.page_bytes // 2].contiguous().view(torch.bfloat16)
        return keys.view(-1, self.shape.head_dim)[:count].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="that it runs, in a minute on a CPU")
    parser.add_argument("--seconds", type=float, default=240, help="begin no part after so many")
    arguments = parser.parse_args()
    begun = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "device": arguments.device}
    if arguments.device == "cuda":
        found["device"] = torch.cuda.get_device_name()

    def keep(name: str, part: Any) -> None:
        found[name] = part
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    attempt(
        keep,
        "answers",
        lambda: answers(arguments.device, *((300, 4) if arguments.tiny else (1500, 64))),
    )
    attempt(keep, "RetrievalAttention on a 4090", paper)
    attempt(keep, "copies", lambda: copies(arguments.device))
    rows: list[KernelRow] = []
    attempt(lambda *_: None, "parts", lambda: rows.extend(measured_rows(arguments.device)))
    keep("parts", [asdict(row) for row in rows])
    long: list[Long] = []
    attempt(lambda *_: None, "model", lambda: long.append(Long(arguments.device, arguments.tiny)))
    if long:
        attempt(keep, "matrices", long[0].matrices)
        alone = found["matrices"]
        matrices_s = alone["seconds"] if isinstance(alone, dict) else None
        long[0].parts = Parts(kernels_with(rows), matrices_s)
    budgets = (128,) if arguments.tiny else BUDGETS
    reader = replace(options(2048)["bf16"], tier="device")
    for name, option, context in (
        ("all on the device, 2k", Option(), 2048),
        ("quest on the device, 32k", reader, 32768),
        ("quest on the host, 32k", replace(reader, tier="host"), 32768),
    ):
        if long and not arguments.tiny:
            attempt(keep, name, lambda o=option, n=context: long[0].case(o, n))
    for tokens in budgets if long else ():
        for name, option in options(tokens).items():
            if time.monotonic() - begun > arguments.seconds:
                say("out of time before", tokens, name)
                continue
            if name == "int4" and tokens != budgets[0]:
                continue
            attempt(keep, f"{tokens} tokens a head, {name}", lambda o=option: long[0].case(o))
    say(json.dumps(found, indent=1)[-4000:])


if __name__ == "__main__":
    if os.environ.keys().isdisjoint(ALLOCATOR) and "--tiny" not in sys.argv:
        os.environ |= ALLOCATOR  # read when the first tensor is made
    main()
