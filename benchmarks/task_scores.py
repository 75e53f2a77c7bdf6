"""Which answers survive compression, task by task: packaged plans and baselines at equal bytes.

    python benchmarks/task_scores.py --out benchmarks/results/task-scores-h200.json

SmolLM2-135M on the made-up tasks of ``traces/tasks.py`` (needles among noise and among others,
variable tracking, common and frequent words, turns about one context, instructions kept, secrets
leaked), all asked after the prompt was compressed. Plans come from the packaged tables, or those of
``--tables``, which hold no task. Beside each share of answer tokens that the model would have given
stands the full cache's own; of ``leak`` a lower one is the better. Written after every sample,
until ``--seconds``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune.common.files import write_json
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import fresh_prompt
from kvtune.simulator.quality.tables import Tables
from kvtune.simulator.quality.tables_file import load_tables
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import by_turns
from kvtune.traces.tasks import TASKS
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.baselines import FAMILIES, STRONG, candidates
from kvtune.tuner.solver import policy_of
from kvtune.tuner.source_models import packaged_tables
from kvtune.tuner.validate import union_of_needs

SHARES = (0.03, 0.06, 0.12, 0.25)
BASELINES = ("uniform", "adakv", "kvzip", "expected_attention")
ROWS = 18


def plans(tables: Tables, shares: Sequence[float]) -> list[tuple[float, str, Policy]]:
    """The tables' plan at every share of the bf16 bytes."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint)
    full = 4 * tables.heads * tables.head_dim * tables.prompt_tokens
    lengths = footprint_of_lengths(1, tables.heads)
    return [
        (share, "plan", policy_of(tables, solve(problem, int(share * full) - lengths), "plan"))
        for share in shares
    ]


def baselines(
    loaded: LoadedModel, prompt: int, shares: Sequence[float], families: Sequence[str]
) -> list[tuple[float, str, Policy]]:
    """Published methods in four bits with exact sinks, filled to the same bytes."""
    geometry = loaded.geometry
    shape = (prompt, geometry.layers, geometry.kv_heads, geometry.head_dim)
    full = 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * prompt
    found = []
    for share in shares:
        for family in families:
            only = {(method, Int4(exact_first=4)) for _, method in (FAMILIES | STRONG)[family]}
            for policy in candidates(family, int(share * full), *shape, only):
                found.append((share, policy.name, policy))
    return found


def right(correct: np.ndarray, asked: np.ndarray) -> list[int]:
    """Answer tokens right, and asked."""
    return [int(correct[asked].sum()), int(asked.sum())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=4, help="of each task")
    parser.add_argument("--seconds", type=float, default=150.0, help="no sample is begun after")
    parser.add_argument("--tiny", action="store_true", help="one short sample of each task")
    parser.add_argument("--tables", type=Path, help="of quality.py, in place of the packaged ones")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.monotonic()
    tables = load_tables(arguments.tables)[0] if arguments.tables else packaged_tables()[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model("smollm2-135m", device=arguments.device, dtype="float32")
    tokens, observed, each, shares = 2048, 256, arguments.samples, SHARES
    families = BASELINES
    if arguments.tiny:
        tokens, observed, each, shares, families = 384, 128, 1, SHARES[2:3], BASELINES[:1]
    workload = Workload({"evaluate": dict.fromkeys(TASKS, each)}, tokens=tokens, observed=observed)
    entries = [
        *plans(tables, shares),
        *baselines(loaded, tokens - observed, shares, families),
    ]
    policies = [policy for _, _, policy in entries]
    rows: list[dict[str, Any]] = [
        {"share": share, "policy": name, "kl": {}, "right": {}} for share, name, _ in entries
    ]
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if loaded.device != "cpu" else "cpu",
        "workload": workload.describe(),
        "no needle in the last": UNASKED_END,
        "full": {},
        "policies": rows,
    }
    for sample in by_turns(build(workload, loaded.tokenizer)):
        if time.monotonic() - started > arguments.seconds:
            found.setdefault("left out", []).append(sample.id)
            continue
        prompt = fresh_prompt(loaded, sample, union_of_needs(policies))
        full, asked = full_cache(loaded, sample, prompt), np.array(sample.answer_mask)
        for at in range(0, len(policies), ROWS):
            runs = run_live(loaded, sample, prompt, policies[at : at + ROWS], full)
            for row, run in zip(rows[at : at + ROWS], runs, strict=True):
                row["kl"].setdefault(sample.kind, []).append(round(float(run.kl.mean()), 6))
                row["right"].setdefault(sample.kind, []).append(right(run.correct, asked))
        found["full"].setdefault(sample.kind, []).append(right(runs[0].full_correct, asked))
        found["seconds"] = round(time.monotonic() - started, 1)
        write_json(arguments.out, found)
        print(f"[{found['seconds']:6.1f} s] {sample.id}", file=sys.stderr, flush=True)
    for line in table(found):
        print(line)


def table(found: dict[str, Any]) -> list[str]:
    """Shares of answer tokens right, as Markdown."""

    def shares(scores: dict[str, list[list[int]]]) -> str:
        sums = [np.sum(scores[kind], 0) for kind in found["full"]]
        return " | ".join(f"{100 * ours / asked:.0f}" for ours, asked in sums)

    return [
        "| KV bytes | | " + " | ".join(found["full"]) + " |",
        "|---" * (len(found["full"]) + 2) + "|",
        f"| 100 % | full cache | {shares(found['full'])} |",
        *(
            f"| {row['share']:.0%} | {row['policy']} | {shares(row['right'])} |"
            for row in found["policies"]
        ),
    ]


if __name__ == "__main__":
    main()
