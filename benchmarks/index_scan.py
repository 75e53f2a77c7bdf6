"""How many keys an index compares to find the 100 that a query looks at most, on SmolLM2.

    python benchmarks/index_scan.py --out benchmarks/results/index-scan-h200.json [--seconds 150]
    python benchmarks/index_scan.py --device cpu --tokens 3072 --seconds 600 --out FILE
    python benchmarks/index_scan.py --device cpu --tiny --out FILE     # that it runs

Queries and keys are those of a held-out needle sample of 8k tokens, all that SmolLM2 takes; the
first 128 and last 512 keys are read anyway and are in no index. The graph that joins keys which the
same prompt query looks at stands beside one of keys near to each other, over degrees and numbers of
expansions: ``recall`` of the 100 largest products and ``scanned``, the share of keys compared, are
means over heads and the queries of the answers. ``least`` is the smallest share that reaches 0.95.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from recorded_parts import attempt, say
from torch import Tensor

from kvtune.policies.key_graph import KeyGraph
from kvtune.policies.signals import ALL_QUERIES, Needs
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces.models import load_model
from kvtune.traces.workloads import Workload, build

FIRST, LAST, TOP, WANTED = 128, 512, 100, 0.95
EXPANSIONS = (8, 16, 32, 64, 100)
Joins = Literal["queries", "keys"]


class Captured:
    """What the heads of some layers look for, and where."""

    def __init__(self, device: str, tokens: int, layers: tuple[int, ...]) -> None:
        loaded = load_model("smollm2-135m", device=device)
        plan = Workload({"evaluate": {"retrieval": 1}}, tokens=tokens, observed=128)
        sample = build(plan, loaded.tokenizer)[0]
        prompt = fresh_prompt(loaded, sample, Needs(window=ALL_QUERIES, future=True))
        last = min(LAST, tokens // 8)
        self.heads: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
        for layer in layers:
            signals = prompt(layer)
            heads = len(signals.keys)
            later = signals.given("future").queries.unflatten(0, (heads, -1)).float()
            whole = signals.queries[:, -signals.prompt_tokens :].unflatten(0, (heads, -1)).float()
            for head in range(heads):
                keys = signals.keys[head, FIRST : signals.prompt_tokens - last].float()
                asked, before = later[head].flatten(0, 1), whole[head].flatten(0, 1)
                self.heads.append((layer, head, keys, before, asked))


def measured(captured: Captured, joins: Joins, degree: int, until: float) -> dict[str, Any]:
    """Recall and share compared at each number of expansions, over the heads there is time for."""
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in EXPANSIONS}
    begun, done = time.monotonic(), []
    for layer, head, keys, before, asked in captured.heads:
        if time.monotonic() > until:
            break
        top = min(TOP, len(keys) // 10)
        exact = (asked @ keys.T).topk(top).indices
        graph = KeyGraph.build(keys, before, degree, TOP, TOP, joins)
        for count in EXPANSIONS:
            ids, visited = graph.search(asked, max(top, TOP), count)
            hit = (ids[:, :, None] == exact[:, None]).any(1).float().mean()
            found[count].append((float(hit), float(visited.float().mean())))
        done.append([layer, head])
    rows = [
        {"expansions": count, "recall": float(np.mean(r)), "scanned": float(np.mean(s))}
        for count, pairs in found.items()
        if pairs
        for r, s in [zip(*pairs, strict=True)]
    ]
    reached = [row["scanned"] for row in rows if row["recall"] >= WANTED]
    say(joins, degree, rows)
    return {
        "keys": len(captured.heads[0][2]), "heads": done, "rows": rows,
        "least": min(reached) if reached else None, "seconds": time.monotonic() - begun,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--tokens", type=int, default=8192, help="of the sample")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    found: dict[str, Any] = {"torch": torch.__version__, "device": given.device}

    def record(name: str, part: Any) -> None:
        found[name] = part
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    tokens, layers = (600, (10,)) if given.tiny else (given.tokens, (10, 18))
    captured = Captured(given.device, tokens, layers)
    degrees = (8,) if given.tiny else (16, 35, 8, 4)
    kinds: tuple[Joins, ...] = ("queries", "keys")
    for degree in degrees:
        for joins in kinds:
            if time.monotonic() < until:
                attempt(
                    record,
                    f"joined by {joins}, degree {degree}",
                    lambda j=joins, d=degree: measured(captured, j, d, until),
                )


if __name__ == "__main__":
    main()
