"""Everyone at equal bytes held and at equal bytes read, live on SmolLM2's held-out samples.

    python benchmarks/reading.py --out FILE [--seconds 200] [--shares 3,12] [--parts held,read]
    python benchmarks/reading.py --device cpu --tiny --out FILE     # that it runs

``held``: RazorAttention, DuoAttention, its rule on retrieval heads, RLKV and HeadKV beside the
tuned plan at 3, 6 and 12 % of a prompt's bf16 bytes held. ``read``: readers beside the plan, each
filled to read so much a step, at these shares and at 25 %, the least that TokenSelect can be filled
to; Quest and TokenSelect first, the ``others`` as long as there is time. Ends and blocks are scaled
to prompts of under a thousand tokens, which the published ones would swallow. Every baseline is
filled in 16 bits and in 4 bits with sinks in 16, and shown in the one that loses less on the
selection samples.

The plan is chosen without the held-out samples: what tables predict to be best, what an exchange
makes of each baseline's allocation on the plan's own menu, and the baselines themselves, which a
plan may contain, run live on the selection samples, and the least loss there is the plan.
``chosen`` says which it was, ``margins`` how many times the plan's loss a baseline's is. Gates of
DuoAttention and RLKV are those of --heads (``gates.py`` learns them); without them either is left
out, and said so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reading_baselines import FIRST, OTHERS, Baseline, Filler
from recorded_parts import attempt, say

from kvtune.common.files import atomic
from kvtune.common.progress import Silent
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.head_scores import Floats, read_heads
from kvtune.policies.method import Method
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime.head_detectors import detect
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces import workloads
from kvtune.traces.models import LoadedModel
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Counts, Workload, build
from kvtune.tuner import sources
from kvtune.tuner.allocate import Choice, Problem, exchange, solve, solve_both
from kvtune.tuner.options import FULL, Menu
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import QualitySource, own_trace
from kvtune.tuner.validate import union_of_needs, validate_policies

SHARES = {"held": (0.03, 0.12, 0.06), "read": (0.12, 0.03, 0.06, 0.25)}
ON_THE_MENU: tuple[Method, ...] = (Quest(), Landmark(block=16))
"""Readers that a plan may use: the search has blocks of 64, of which such prompts have 14."""
BY = {"search": {"prose": 4, "code": 4, "retrieval": 8}}
"""Samples that tables are made of."""


def margin(losses: Sequence[float], plan: Sequence[float]) -> dict[str, Any]:
    """A baseline's mean KL over the plan's on the same samples; 95 % bootstrap interval."""
    both = np.array([losses, plan])
    drawn = np.random.default_rng(0).integers(len(plan), size=(10_000, len(plan)))
    ratios = np.divide(*np.maximum(both[:, drawn].mean(-1), 1e-9))
    low, high = np.percentile(ratios, (2.5, 97.5))
    value = float(np.divide(*np.maximum(both.mean(-1), 1e-9)))
    return {"value": value, "interval": [float(low), float(high)], "worse on": sum(
        float(a) > float(b) for a, b in zip(losses, plan, strict=True)
    ), "of": len(plan)}  # fmt: skip


def searched(tokens: int, tiny: bool, counts: Counts) -> None:
    """Tables of search samples alone, of these lengths and of a menu that suits them."""
    plan = Workload(counts, tokens=tokens + 128, observed=128)
    workloads.named_workload = lambda *_: plan  # type: ignore[assignment]
    sources.READERS = ON_THE_MENU
    little = Menu((StreamingLLM(),), (1 / 64, 1 / 4), ((Bf16(), Bf16()),))
    sources.LAPTOP = little if tiny else FULL


class Bench:
    """The model, its tables, and what everybody is chosen and judged on."""

    def __init__(self, device: str, tiny: bool, folder: Path, few: bool = False) -> None:
        """Capture the search samples and make tables of them.

        Args:
            device: of the model.
            tiny: one sample of each split and a menu of seven options.
            folder: of the search, which is not run.
            few: a quarter of the search samples, for a CPU.
        """
        self.tokens = 512 if tiny else 896
        one, quarter = {"retrieval": 1}, {"prose": 1, "code": 1, "retrieval": 2}
        searched(self.tokens, tiny, {"search": one if tiny else quarter} if tiny or few else BY)
        shape = find_model("smollm2-135m")
        request = SearchRequest(
            "smollm2-135m", shape, find_gpu("h200"), 10**11, folder, context_tokens=self.tokens,
            device=device, workload="small", read_bytes=1,
        )  # fmt: skip
        self.source: QualitySource = own_trace(request, Silent())
        assert self.source.loaded is not None
        self.loaded: LoadedModel = self.source.loaded
        geometry = self.loaded.geometry
        self.shape = self.tokens, geometry.layers, geometry.kv_heads, geometry.head_dim
        self.full = 4 * int(np.prod(self.shape))
        self.filler = Filler(self.shape, self.full)
        self.exchanged: dict[float, list[Policy]] = {}  # by the share that they hold
        kinds = one if tiny else {"prose": 4, "code": 4, "retrieval": 8}
        self.judges = self._samples("evaluate", kinds)
        kinds = one if tiny else {"prose": 2, "code": 2, "retrieval": 4}
        self.selection = self._samples("select", kinds)

    def _samples(self, split: str, kinds: dict[str, int]) -> Sequence[Sample]:
        plan = Workload({split: kinds}, tokens=self.tokens + 128, observed=128)
        return build(plan, self.loaded.tokenizer)

    def compared(
        self, share: float, read: bool, baselines: Sequence[Baseline], each: int = 3
    ) -> dict[str, Any]:
        """The plan and its baselines on held-out samples, and how they were chosen.

        Args:
            share: of a prompt's bf16 bytes.
            read: whether it is of what a step reads, or of what is held.
            baselines: filled to it; the format of each that loses least on the selection samples.
            each: baselines whose allocation a plan starts from.
        """
        everyone = [policy for baseline in baselines for policy in baseline]
        if not read:
            starts = [baseline[0] for baseline in baselines[:each]]
            self.exchanged[share] = [self._exchanged(share, start) for start in starts]
        # A plan that holds so much reads no more, so that it stands here in both parts.
        candidates = [*self._solved(share, read), *everyone, *self.exchanged.get(share, [])]
        within = [each for each in candidates if self._share(each, read) <= share]
        found = self._live(candidates, self.selection)
        losses = {
            policy.name: run.live.value for policy, run in zip(candidates, found, strict=True)
        }
        best = min(within, key=lambda policy: losses[policy.name])
        plan = Policy("kvtune plan", best.heads, best.allocator)
        shown = [min(each, key=lambda policy: losses[policy.name]) for each in baselines]
        judged = [plan, candidates[0], *shown]
        runs = self._live(judged, self.judges)
        rows = [self._row(policy, run) for policy, run in zip(judged, runs, strict=True)]
        return {
            "rows": rows,
            "chosen": best.name,
            "readers": sum(o.method.reader(1) is not None for o in best.options()),
            "on_selection": losses,
            "margins": {
                policy.name: margin(run.losses, runs[0].losses)
                for policy, run in zip(judged[1:], runs[1:], strict=True)
            },
        }

    def _solved(self, share: float, read: bool) -> list[Policy]:
        """What the tables predict to be best, with several shares of the terms between heads, and
        with needles counting four times."""
        budget, found = int(share * self.full), []
        ways = [(0.4, {}), (0.1, {}), (0.8, {}), (0.4, {"retrieval": 4.0})]
        for shrinkage, emphasis in ways:
            asked = self._problem(read, emphasis).shrunk(shrinkage)
            choice = (
                solve_both(asked, 2 * self.full, budget)
                if read
                else exchange(asked, budget, solve(asked, budget))
            )
            name = f"solved, {shrinkage:g} of the cross terms"
            name += ", needles four times" if emphasis else ""
            found.append(policy_of(self.source.tables, choice, name))
        return found

    def _problem(self, read: bool, emphasis: Mapping[str, float] | None = None) -> Problem:
        tables = self.source.tables
        footprint = tables.footprints(self.tokens, tables.head_dim)
        problem = Problem.of(tables.of_split("search"), footprint, emphasis=emphasis)
        if not read:
            return problem
        taken = tables.bytes_read(self.tokens, tables.head_dim)
        return replace(problem, read=taken)

    def _exchanged(self, share: float, baseline: Policy) -> Policy:
        """A baseline's bytes a head on the plan's menu, then traded while that lowers the loss."""
        problem, tables = self._problem(read=False), self.source.tables
        budget = int(share * self.full)
        planned = zip(baseline.options(), baseline.budgets(self.tokens).flat, strict=True)
        wanted = [o.footprint(int(n), self.tokens, self.shape[-1]) for o, n in planned]
        choice: Choice = np.array(
            [
                np.where(problem.footprint <= most_, problem.loss[head], np.inf).argmin()
                if (problem.footprint <= most_).any()
                else problem.footprint.argmin()
                for head, most_ in enumerate(wanted)
            ],
            np.int64,
        )
        if problem.spent(choice) > budget:
            choice = solve(problem, budget)
        return policy_of(tables, exchange(problem, budget, choice), f"{baseline.name}, exchanged")

    def _live(self, policies: Sequence[Policy], samples: Sequence[Sample]) -> list[Any]:
        needs = union_of_needs(policies)
        prompts = {s.id: fresh_prompt(self.loaded, s, needs) for s in samples}
        return validate_policies(policies, self.loaded, samples, lambda s: prompts[s.id])

    def _share(self, policy: Policy, read: bool) -> float:
        """Of a prompt's bf16 bytes, what is held or what a step reads; without a length a head."""
        measure = policy.read_bytes if read else policy.footprint
        lengths = footprint_of_lengths(*self.shape[1:3])
        return (measure(self.tokens, self.shape[-1]) - lengths) / self.full

    def _row(self, policy: Policy, found: Any) -> dict[str, Any]:
        tokens, head_dim = self.shape[0], self.shape[-1]
        return {
            "policy": policy.name,
            "kl": found.live.as_dict(),
            "needles": found.retrieval_accuracy and found.retrieval_accuracy.as_dict(),
            "held": policy.footprint(tokens, head_dim) / self.full,
            "read": policy.read_bytes(tokens, head_dim) / self.full,
        }

    def at_equal_reads(self, share: float, readers: Sequence[Method]) -> dict[str, Any]:
        return self.compared(share, True, [self.filler.reader(share, each) for each in readers])

    def at_equal_bytes(self, share: float, heads: dict[str, Floats]) -> dict[str, Any]:
        return self.compared(share, False, self.filler.by_heads(share, heads))


def scores_of(bench: Bench, tiny: bool, file: Path | None) -> dict[str, Floats]:
    """Head scores detected here, and those of a file, of KV heads."""
    needles = Workload(
        {"search": {"retrieval": 1 if tiny else 8}}, tokens=bench.tokens + 128, observed=128
    )
    loaded = bench.loaded
    found = detect(loaded, build(needles, loaded.tokenizer), block=64 if tiny else 1000)
    scores = {n: found.of_kv_heads(n, loaded.geometry.kv_heads) for n in found.scores}
    if file is not None:
        given = read_heads(file)
        scores |= {n: given.of_kv_heads(n, loaded.geometry.kv_heads) for n in given.scores}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="that it runs, in some minutes")
    parser.add_argument("--seconds", type=float, default=200, help="begin no part after so many")
    parser.add_argument("--heads", type=Path, help="head scores with the gates duo and rlkv")
    parser.add_argument("--few", action="store_true", help="a quarter of the search samples")
    parser.add_argument("--parts", default="held,read,others", help="some of these")
    parser.add_argument("--shares", default="", help="some of the shares, in percent: 3,12")
    arguments = parser.parse_args()
    begun = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "no needle in the last": UNASKED_END}

    def record(name: str, part: Any) -> None:
        found[name] = part
        with atomic(arguments.out) as temporary:  # a run may be ended at any time
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.device, arguments.tiny, Path(folder), arguments.few)
        tables = time.monotonic()
        heads = scores_of(bench, arguments.tiny, arguments.heads)
        say(f"tables {tables - begun:.0f} s, head scores {time.monotonic() - tables:.0f} s")
        found |= {
            "device": bench.loaded.device, "samples": len(bench.judges),
            "tables of": bench.source.provenance["workload"],
            "options": len(bench.source.tables.options),
        }  # fmt: skip
        for score, name in (("duo", "DuoAttention"), ("rlkv", "RLKV")):
            if score not in heads:
                found[name] = "left out: no trained gates were given (--heads)"
        for name, share in wanted(arguments):
            if time.monotonic() - begun > arguments.seconds:
                say("out of time before", name, share)
                continue
            measure = {
                "held": partial(bench.at_equal_bytes, share, heads),
                "read": partial(bench.at_equal_reads, share, FIRST),
                "others": partial(bench.at_equal_reads, share, OTHERS),
            }[name]
            label = {"others": f"read {100 * share:g} %, others"}.get(
                name, f"{name} {100 * share:g} %"
            )
            attempt(record, label, measure)
    for name, each in found.items():
        for row in each["rows"] if isinstance(each, dict) and "rows" in each else ():
            kl, needles = row["kl"]["value"], row["needles"] and row["needles"]["value"]
            say(name, row["policy"], kl, needles, row["held"], row["read"])


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Parts and shares, the held and read ones of the lowest shares first."""
    parts = arguments.parts.split(",")
    only = {float(share) / 100 for share in arguments.shares.split(",") if share}
    if arguments.tiny and not only:
        only = {0.12}
    pairs = [
        (p, s) for both in zip_longest(*SHARES.values()) for p, s in zip(SHARES, both, strict=True)
    ]
    pairs += [("others", share) for share in SHARES["held"]]
    for part, share in pairs:
        if share is not None and part in parts and (not only or share in only):
            yield part, share


if __name__ == "__main__":
    main()
