"""Long generations under every method that evicts while decoding, at equal mean bytes.

    python benchmarks/long_generation.py --device cuda --workers 4 --prompts 4 --tokens 256 \
        --temperature 1.0 --seconds 150
    python benchmarks/long_generation.py --table benchmarks/results/long-generation-cpu.json

The full cache generates from prompts that no search has seen; every method reads the same tokens
from a cache that evicts, live, in float32. A share is the mean bytes that a method holds over all
steps, statistics included, over those of the full cache in 16 bits; budgets are found by stepping
the methods' own books, and the bytes that were measured are written beside them. Prompts run in
several processes, prose and code by turns; each hands back what it has when time is up, and the
summary grows as they do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import workers

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.methods.a2sf import A2SF
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.keyformer import Keyformer
from kvtune.policies.methods.lazy_eviction import LazyEviction
from kvtune.policies.methods.scissorhands import Scissorhands
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.generate import Generation
from kvtune.runtime.generation_run import GenerationRun
from kvtune.runtime.live_policies import LivePolicy
from kvtune.traces.models import load_model
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.quality import bootstrap

METHODS: dict[str, DecodeMethod] = {
    "window": StreamingLLM(sinks=0),
    "streaming_llm": StreamingLLM(),
    "streaming_llm reindexed": StreamingLLM(positions="reindexed"),
    "h2o": H2O(),
    "tova": Tova(),
    "tova per kv_head": Tova(unit="kv_head"),
    "scissorhands": Scissorhands(),
    "a2sf 0.2": A2SF(),
    "a2sf 0.95": A2SF(factor=0.95, recent=16),
    "keyformer": Keyformer(),
    "lazy_eviction": LazyEviction(),
    "lazy_eviction 25, note": LazyEviction(window=25, h2="note", h1_shift=0.0, count_own=False),
}
SHARES = (0.05, 0.1, 0.2, 0.4)
STRETCH = 8
TO_HAND_BACK = 0.9  # of the time: when processes stop generating


@dataclass(frozen=True)
class Task:
    """What is asked of every prompt; ``until`` by ``time.monotonic()``."""

    tokens: int
    temperature: float
    until: float


def mean_entries(method: DecodeMethod, prompt: int, tokens: int, budget: int) -> float:
    """Entries of a head that a method holds after a step, mean over the steps."""
    held = min(prompt, budget) if method.trims_prompt else prompt
    sizes, limit, total = np.array([[held]]), np.array([[budget]]), 0
    for step in range(1, tokens + 1):
        sizes = sizes + 1
        sizes = sizes - method.drops(sizes, limit, step)
        total += int(sizes[0, 0])
    return total / tokens


def fitting(
    method: DecodeMethod, prompt: int, tokens: int, head_dim: int, share: float
) -> int | None:
    """The largest budget whose mean bytes are within a share of the full cache's; None if none."""
    entry = Option().footprint(1, 1, head_dim)
    room = share * (prompt + (tokens + 1) / 2) * entry / (entry + method.entry_bits / 8)
    low, high = 0, prompt + tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = mean_entries(method, prompt, tokens, middle) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low or None


def policies(geometry: Any, prompt: int, tokens: int) -> list[LivePolicy]:
    found = []
    for share in SHARES:
        for name, method in METHODS.items():
            budget = fitting(method, prompt, tokens, geometry.head_dim, share)
            if budget is not None:
                option = Option(method, Budget(tokens=budget))
                shape = geometry.layers, geometry.kv_heads
                label = f"{name} @ {share:.0%}"
                found.append(LivePolicy(Policy.uniform(option, *shape, name=label)))
    return found


def generate(sample: Sample, task: Task) -> dict[str, Any]:
    """Generate from one prompt; what there is when time is up is handed back."""
    loaded, ids = workers.loaded(), sample.token_ids
    end = loaded.tokenizer.eos_token_id
    started = time.monotonic()
    generation = Generation(
        loaded,
        ids,
        policies(loaded.geometry, len(ids) - 1, task.tokens),
        room=task.tokens,
        temperature=task.temperature,
        seed=int(sample.id.rsplit("-", 1)[-1]),
        banned=[] if end is None else [end],
    )
    while generation.generated < task.tokens:
        generation.advance(STRETCH)
        if time.monotonic() > task.until:
            break
    return {
        "prompt": sample.id,
        "kind": sample.kind,
        "prompt_tokens": generation.prompt_tokens,
        "tokens": generation.generated,
        "seconds": time.monotonic() - started,
        "distinct_tokens": len(set(generation.token_ids)),
        "text": loaded.tokenizer.decode(generation.token_ids)[:300],
        "full_mean_bytes": full_mean_bytes(loaded.geometry, generation),
        "runs": [outcome(result) for result in generation.results()],
    }


def full_mean_bytes(geometry: Any, generation: Generation) -> float:
    entries = generation.prompt_tokens + (generation.generated + 1) / 2
    per_entry = Option().footprint(1, 1, geometry.head_dim)
    return entries * geometry.layers * geometry.kv_heads * per_entry


def outcome(run: GenerationRun) -> dict[str, Any]:
    quarters = np.array_split(run.kl, 4)
    return {
        "name": run.name,
        "kl": float(run.kl.mean()),
        "kl_by_quarter": [float(quarter.mean()) for quarter in quarters],
        "nll_change": float((run.nll - run.full_nll).mean()),
        "agreement": float(run.agrees.mean()),
        "evicted_least": int(run.evicted.min()),
        "evicted_mean": float(run.evicted.mean()),
        "trimmed_mean": float(run.trimmed.mean()),
        "peak_entries": int(run.peak_entries.max()),
        "mean_bytes": run.mean_bytes,
        "peak_bytes": run.peak_bytes,
        "statistics_bytes": run.statistics_bytes,
    }


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Each policy over all prompts; KL with a 95 % bootstrap interval over prompts."""
    found: dict[str, Any] = {}
    kinds = [part["kind"] for part in parts]
    for place, first in enumerate(parts[0]["runs"]):
        runs = [part["runs"][place] for part in parts]
        kl = [run["kl"] for run in runs]
        drawn = bootstrap(kl, kinds)
        shares = [r["mean_bytes"] / p["full_mean_bytes"] for r, p in zip(runs, parts, strict=True)]
        found[first["name"]] = {
            "kl": float(np.mean(kl)),
            "kl_interval": [float(x) for x in np.percentile(drawn, [2.5, 97.5])],
            "share_of_mean_bytes": float(np.mean(shares)),
            "evicted_by_every_head": min(run["evicted_least"] for run in runs) > 0,
            **{
                name: float(np.mean([run[name] for run in runs]))
                for name in ("nll_change", "agreement", "evicted_mean", "peak_entries")
            },
            "kl_by_quarter": np.mean([run["kl_by_quarter"] for run in runs], 0).tolist(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop generating by then")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long-generation.json"))
    parser.add_argument("--table", type=Path, help="print a result as a Markdown table, no more")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["contenders"]))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    for part in measured(arguments, time.monotonic()):
        parts.append(part)
        report(arguments, parts)
    print(table(summary(parts)) if parts else "no prompt ended in time")


def measured(arguments: argparse.Namespace, started: float) -> Iterator[dict[str, Any]]:
    """Every prompt's generation, as they end."""
    place = workers.Place(arguments.model, arguments.device, arguments.out.parent)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(arguments.model, dtype="float32")
        crew.model_is_stored()
        until = started + TO_HAND_BACK * arguments.seconds
        task = Task(arguments.tokens, arguments.temperature, until)
        samples = prompts(arguments, loaded.tokenizer)
        for _, part in crew.until(started + arguments.seconds, generate, samples, task):
            yield part
        for failure in crew.failures:
            print(failure)


def prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    each = -(-arguments.prompts // 2)
    workload = Workload(
        {"evaluate": {"prose": each, "code": each}}, tokens=arguments.prompt_tokens + 1, observed=1
    )
    return by_turns(build(workload, tokenizer))[: arguments.prompts]


def report(arguments: Any, parts: list[dict[str, Any]]) -> None:
    described = {name: repr(method) for name, method in METHODS.items()}
    found = {
        "model": arguments.model,
        "device": arguments.device,
        "temperature": arguments.temperature,
        "methods": described,
        "contenders": summary(parts),
        "prompts": [{k: v for k, v in part.items() if k != "runs"} for part in parts],
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    last = parts[-1]
    print(f"{last['prompt']}: {last['tokens']} tokens in {last['seconds']:.0f} s", flush=True)


def table(found: dict[str, Any]) -> str:
    """Methods by shares as Markdown: KL, then entries that each head evicted while generating."""
    columns = [f"{share:.0%}" for share in SHARES]
    lines = [
        f"| method | KL at {' | '.join(columns)} | evicted a head, at {' / '.join(columns)} "
        "| every head evicted |",
        f"|---{'|---' * (len(columns) + 2)}|",
    ]
    for method in METHODS:
        rows = [found.get(f"{method} @ {column}") for column in columns]
        evicted = " / ".join(f"{row['evicted_mean']:.0f}" if row else "-" for row in rows)
        all_did = all(row["evicted_by_every_head"] for row in rows if row)
        kl = " | ".join(figure(row) for row in rows)
        lines.append(f"| {method} | {kl} | {evicted} | {'yes' if all_did else 'no'} |")
    return "\n".join(lines)


def figure(row: dict[str, Any] | None) -> str:
    """``0.058 [0.04, 0.08]``; without an interval of one prompt; ``-`` where no budget fits."""
    if row is None:
        return "-"
    low, high = row["kl_interval"]
    return f"{row['kl']:.3g}" + (f" [{low:.2g}, {high:.2g}]" if low < high else "")


if __name__ == "__main__":
    main()
