"""Everyone at equal bytes read and at equal bytes held, live on SmolLM2; and what an index scans.

    python benchmarks/reading.py --out benchmarks/results/reading-h200.json

``read``: every reader and the tuned plan, each filled to read 3, 6 and 12 % of a prompt's bf16
bytes a step. Ends and blocks are scaled to prompts of under a thousand tokens, which the published
ones would swallow. ``held``: RazorAttention, DuoAttention's rule on retrieval scores, and HeadKV
beside the tuned plan at 3, 6 and 12 % held. ``index``: recall of the 100 largest logits by the
graph made for queries and by one of keys alone, against the share of keys compared, on queries that
the model really asks of 8k tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import attempt, say

from kvtune.common.progress import Silent
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.actqkv_layers import ActQKVLayers
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.head_plans import headkv_plan, most, two_kinds
from kvtune.policies.head_scores import Floats
from kvtune.policies.key_graph import KeyGraph
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import ALL_QUERIES, Needs
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime.head_detectors import detect
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces import workloads
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner import sources
from kvtune.tuner.allocate import Problem, solve, solve_both
from kvtune.tuner.baselines import fill
from kvtune.tuner.options import Menu
from kvtune.tuner.question import policy_of
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.sources import QualitySource, own_trace
from kvtune.tuner.validate import union_of_needs, validate_policies

SHARES = (0.03, 0.06, 0.12)
READERS: tuple[Method, ...] = (
    Quest(),
    Quest(block=64),
    TokenSelect(sinks=4, recent=16),
    InfLLM(block=16, sinks=4, recent=32),
    ActQKV(block=16, sinks=4, recent=32),
    Landmark(block=16),
    Landmark(block=64),
    InfLLM(block=64, sinks=4, recent=16),
    ShadowKV(),
    Recycled(stride=50),
    RetrievalAttention(sinks=4, recent=32, degree=16, near=32, beam=64),
)


def make_small() -> None:
    """Few options and short samples, so that a CPU gets through."""
    counts = {split: {"retrieval": 1} for split in ("search", "select", "evaluate")}
    little = Workload(counts, tokens=640, observed=128)
    workloads.named_workload = lambda *_: little  # type: ignore[assignment]
    sources.LAPTOP = Menu((StreamingLLM(),), (1 / 16, 1 / 4), ((Bf16(), Bf16()),))


class Bench:
    """The model, its tables and what everybody is judged on."""

    def __init__(self, device: str, tiny: bool, folder: Path) -> None:
        if tiny:
            make_small()
        self.tokens = 512 if tiny else 896
        shape = find_model("smollm2-135m")
        request = SearchRequest(
            "smollm2-135m", shape, find_gpu("h200"), 10**11, folder, context_tokens=self.tokens,
            device=device, workload="small", read_bytes=1,
        )  # fmt: skip
        self.source: QualitySource = own_trace(request, Silent())
        assert self.source.loaded is not None
        self.loaded: LoadedModel = self.source.loaded
        kinds = {"retrieval": 1} if tiny else {"prose": 4, "code": 4, "retrieval": 8}
        counts = {"evaluate": kinds}
        plan = Workload(counts, tokens=self.tokens + 128, observed=128)
        self.samples: Sequence[Sample] = build(plan, self.loaded.tokenizer)
        geometry = self.loaded.geometry
        self.shape = self.tokens, geometry.layers, geometry.kv_heads, geometry.head_dim
        self.full = 4 * int(np.prod(self.shape))

    def tuned(self, share: float, read: bool) -> Policy:
        """Our plan, of tables that know two readers."""
        tables = self.source.tables
        footprint = tables.footprints(self.tokens, tables.head_dim)
        taken = tables.bytes_read(self.tokens, tables.head_dim)
        problem = Problem.of(tables.of_split("search"), footprint)
        budget = int(share * self.full)
        if read:
            limited = Problem(problem.loss, problem.factor, footprint, read=taken)
            choice = solve_both(limited, 2 * self.full, budget)
        else:
            choice = solve(problem, budget)
        return policy_of(tables, choice, "kvtune plan")

    def judged(self, policies: Sequence[Policy]) -> list[dict[str, Any]]:
        """Each live on the held-out samples."""
        needs = union_of_needs(policies)
        prompts = {s.id: fresh_prompt(self.loaded, s, needs) for s in self.samples}
        live = validate_policies(policies, self.loaded, self.samples, lambda s: prompts[s.id])
        tokens, head_dim = self.shape[0], self.shape[-1]
        return [
            {
                "policy": policy.name,
                "kl": found.live.as_dict(),
                "needles": found.retrieval_accuracy and found.retrieval_accuracy.as_dict(),
                "held": policy.footprint(tokens, head_dim) / self.full,
                "read": policy.read_bytes(tokens, head_dim) / self.full,
            }
            for policy, found in zip(policies, live, strict=True)
        ]

    def at_equal_reads(self, share: float, readers: Sequence[Method]) -> list[dict[str, Any]]:
        made = [self.tuned(share, read=True)]
        for method in readers:
            allocators = (AsGiven(), ActQKVLayers()) if isinstance(method, ActQKV) else (AsGiven(),)
            for allocator in allocators:
                budget = int(share * self.full)
                policy = fill(Option(method), allocator, budget, *self.shape, reads=True)
                made.append(policy or self.attending(share, method, allocator))
        return self.judged(made)

    def attending(self, share: float, method: Method, allocator: Allocator) -> Policy:
        """What reads more than the share only to choose: it attends to that share of the tokens."""
        option = Option(method, Budget(tokens=max(round(share * self.tokens), 1)))
        name = f"{method.label}, attending to the share and reading more"
        layers, heads = self.shape[1:3]
        return Policy.uniform(option, layers, heads, name=name, allocator=allocator)

    def at_equal_bytes(self, share: float, heads: dict[str, Floats]) -> list[dict[str, Any]]:
        budget, tokens = int(share * self.full), self.shape[0]
        rest = max(round(share / 2 * tokens), 8)

        def largest(name: str, score: Floats, method: Method) -> Policy:
            """As many heads in full as fit, all others with half of the share."""
            fits = [
                policy
                for n in range(1, score.size)
                if (policy := two_kinds(name, most(score, n / score.size), method, rest)).footprint(
                    tokens, self.shape[-1]
                )
                <= budget
            ]
            return fits[-1]

        def headkv(mean: int) -> Policy:
            return headkv_plan(heads["retrieval"], mean)

        means = [
            m for m in range(9, tokens) if headkv(m).footprint(tokens, self.shape[-1]) <= budget
        ]
        made = [
            self.tuned(share, read=False),
            largest("RazorAttention", heads["induction"], Razor()),
            largest("DuoAttention's rule on retrieval heads", heads["retrieval"], StreamingLLM()),
            headkv(means[-1]),
        ]
        return self.judged(made)


def index(loaded: LoadedModel, tokens: int, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Recall and share compared, mean over KV heads and queries, of each layer."""
    plan = Workload({"evaluate": {"retrieval": 1}}, tokens=tokens, observed=128)
    sample = build(plan, loaded.tokenizer)[0]
    prompt = fresh_prompt(loaded, sample, Needs(window=ALL_QUERIES, future=True))
    top = min(100, tokens // 20)
    found = []
    for layer in layers:
        signals = prompt(layer)
        heads = len(signals.keys)
        first, last = 128, 512 if tokens > 2048 else 128
        for joins in ("queries", "keys"):
            graphs = []
            begun = time.monotonic()
            for head in range(heads):
                keys = signals.keys[head, first : signals.prompt_tokens - last].float()
                asked = signals.queries.unflatten(0, (heads, -1))[head].float().flatten(0, 1)
                graphs.append(KeyGraph.build(keys, asked, 35, 100, 100, joins))
            seconds = time.monotonic() - begun
            for beam in (100, 200, 400):
                recalls, scans = [], []
                for head, graph in enumerate(graphs):
                    queries = signals.given("future").queries.unflatten(0, (heads, -1))
                    rows = queries[head].float().flatten(0, 1)
                    exact = (rows @ graph.keys.T).topk(top).indices
                    ids, visited = graph.search(rows, max(beam, top))
                    hit = (ids[:, :, None] == exact[:, None]).any(1)
                    recalls.append(float(hit.float().mean()))
                    scans.append(float(visited.float().mean()))
                found.append(
                    {
                        "layer": layer, "joins": joins, "beam": beam, "top": top,
                        "keys": len(graphs[0].keys), "recall": float(np.mean(recalls)),
                        "scanned": float(np.mean(scans)), "build_s": seconds,
                    }
                )  # fmt: skip
                say("index", found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="that it runs, in some minutes")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__}
    record = found.__setitem__

    def keep() -> None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        bench = Bench(arguments.device, arguments.tiny, Path(folder))
        say("tables", f"{time.monotonic() - begun:.0f} s")
        loaded = bench.loaded
        found |= {"device": loaded.device, "samples": len(bench.samples)}
        needles = Workload(
            {"search": {"retrieval": 1 if arguments.tiny else 8}},
            tokens=bench.tokens + 128,
            observed=128,
        )
        block = 64 if arguments.tiny else 2000
        scores = detect(loaded, build(needles, loaded.tokenizer), block=block)
        heads = {n: scores.of_kv_heads(n, loaded.geometry.kv_heads) for n in scores.scores}
        readers = READERS[:3] if arguments.tiny else READERS
        for share in SHARES[-1:] if arguments.tiny else SHARES:
            name = f"{100 * share:g} %"
            attempt(record, f"read {name}", lambda s=share: bench.at_equal_reads(s, readers))
            attempt(record, f"held {name}", lambda s=share: bench.at_equal_bytes(s, heads))
            keep()
        tokens, layers = (1024, (10,)) if arguments.tiny else (8192, (2, 10, 18, 26))
        attempt(record, "index", lambda: index(loaded, tokens, layers))
        keep()
    for name, part in found.items():
        if isinstance(part, list) and part and "kl" in part[0]:
            for row in part:
                say(name, row["policy"], row["kl"]["value"], row["needles"], row["read"])


if __name__ == "__main__":
    main()
