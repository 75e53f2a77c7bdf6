"""Everyone at equal bytes held and at equal bytes read, live on SmolLM2's held-out samples.

    python benchmarks/reading.py --out benchmarks/results/reading-h200.json [--seconds 200]
    python benchmarks/reading.py --device cpu --tiny --out FILE     # that it runs

``held``: RazorAttention, DuoAttention's and RLKV's rules and HeadKV beside the tuned plan at 3, 6
and 12 % of a prompt's bf16 bytes held. ``read``: readers beside the plan, each filled to read so
much a step; Quest and TokenSelect first, the others as long as there is time. Ends and blocks are
scaled to prompts of under a thousand tokens, which the published ones would swallow.

The plan is chosen without the held-out samples: what tables predict to be best, what an exchange
makes of each baseline's allocation on the plan's own menu, and the baselines themselves, which a
plan may contain, run live on the selection samples, and the least loss there is the plan.
``chosen`` says which it was, ``margins`` how many times the plan's loss a baseline's is. RLKV's
gates are those of --heads; without them it is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_parts import attempt, say

from kvtune.common.files import atomic
from kvtune.common.progress import Silent
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.head_plans import headkv_plan, most, two_kinds
from kvtune.policies.head_scores import Floats, read_heads
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV
from kvtune.policies.methods.infllm import InfLLM
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.recycled import Recycled
from kvtune.policies.methods.shadowkv import ShadowKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.token_select import TokenSelect
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.runtime.head_detectors import detect
from kvtune.runtime.prompts import fresh_prompt
from kvtune.traces import workloads
from kvtune.traces.models import LoadedModel
from kvtune.traces.needles import UNASKED_END
from kvtune.traces.samples import Sample
from kvtune.traces.workloads import Workload, build
from kvtune.tuner import sources
from kvtune.tuner.allocate import Choice, Problem, exchange, solve, solve_both
from kvtune.tuner.baselines import fill
from kvtune.tuner.options import Menu
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.solver import policy_of
from kvtune.tuner.sources import QualitySource, own_trace
from kvtune.tuner.validate import union_of_needs, validate_policies

SHARES = (0.12, 0.03, 0.06)
FIRST: tuple[Method, ...] = (Quest(), Quest(block=64), TokenSelect(sinks=4, recent=16))
OTHERS: tuple[Method, ...] = (
    Landmark(block=16),
    Landmark(block=64),
    InfLLM(block=16, sinks=4, recent=32),
    ActQKV(block=16, sinks=4, recent=32),
    ShadowKV(),
    Recycled(stride=50),
)


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


def make_small() -> None:
    """Few options and short samples, so that a CPU gets through."""
    counts = {split: {"retrieval": 1} for split in ("search", "select", "evaluate")}
    little = Workload(counts, tokens=640, observed=128)
    workloads.named_workload = lambda *_: little  # type: ignore[assignment]
    sources.LAPTOP = Menu((StreamingLLM(),), (1 / 16, 1 / 4), ((Bf16(), Bf16()),))


class Bench:
    """The model, its tables, and what everybody is chosen and judged on."""

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
        geometry = self.loaded.geometry
        self.shape = self.tokens, geometry.layers, geometry.kv_heads, geometry.head_dim
        self.full = 4 * int(np.prod(self.shape))
        few = {"retrieval": 1}
        kinds = few if tiny else {"prose": 4, "code": 4, "retrieval": 8}
        self.exchanged: dict[float, list[Policy]] = {}  # by the share that they hold
        self.judges = self._samples("evaluate", kinds)
        kinds = few if tiny else {"prose": 2, "code": 2, "retrieval": 4}
        self.selection = self._samples("select", kinds)

    def _samples(self, split: str, kinds: dict[str, int]) -> Sequence[Sample]:
        plan = Workload({split: kinds}, tokens=self.tokens + 128, observed=128)
        return build(plan, self.loaded.tokenizer)

    def compared(
        self, share: float, read: bool, baselines: Sequence[Policy], each: int = 3
    ) -> dict[str, Any]:
        """The plan and its baselines on held-out samples, and how the plan was chosen.

        Args:
            share: of a prompt's bf16 bytes.
            read: whether it is of what a step reads, or of what is held.
            baselines: filled to it.
            each: baselines whose allocation a plan starts from.
        """
        if not read:
            self.exchanged[share] = [
                self._exchanged(share, baseline) for baseline in baselines[:each]
            ]
        # A plan that holds so much reads no more, so that it stands here in both parts.
        candidates = [*self._solved(share, read), *baselines, *self.exchanged.get(share, [])]
        chosen = self._live(candidates, self.selection)
        best = min(range(len(chosen)), key=lambda n: chosen[n].live.value)
        plan = Policy("kvtune plan", candidates[best].heads, candidates[best].allocator)
        judged = [plan, candidates[0], *baselines]
        runs = self._live(judged, self.judges)
        rows = [self._row(policy, found) for policy, found in zip(judged, runs, strict=True)]
        return {
            "rows": rows,
            "chosen": candidates[best].name,
            "on_selection": {
                policy.name: found.live.value
                for policy, found in zip(candidates, chosen, strict=True)
            },
            "margins": {
                policy.name: margin(run.losses, runs[0].losses)
                for policy, run in zip(judged[1:], runs[1:], strict=True)
            },
        }

    def _solved(self, share: float, read: bool) -> list[Policy]:
        """What the tables predict to be best, with several shares of the terms between heads."""
        tables, found = self.source.tables, []
        problem, budget = self._problem(read), int(share * self.full)
        for shrinkage in (0.4, 0.1, 0.8):
            asked = problem.shrunk(shrinkage)
            choice = (
                solve_both(asked, 2 * self.full, budget)
                if read
                else exchange(asked, budget, solve(asked, budget))
            )
            found.append(policy_of(tables, choice, f"solved, {shrinkage:g} of the cross terms"))
        return found

    def _problem(self, read: bool) -> Problem:
        tables = self.source.tables
        footprint = tables.footprints(self.tokens, tables.head_dim)
        problem = Problem.of(tables.of_split("search"), footprint)
        if not read:
            return problem
        taken = tables.bytes_read(self.tokens, tables.head_dim)
        return Problem(problem.loss, problem.factor, footprint, read=taken)

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
        return self.compared(share, True, [self._reading(share, method) for method in readers])

    def _reading(self, share: float, method: Method) -> Policy:
        """Filled to the share; what reads more only to choose attends to that share of tokens."""
        budget = int(share * self.full)
        filled = fill(Option(method), AsGiven(), budget, *self.shape, reads=True)
        if filled is not None:
            return filled
        option = Option(method, Budget(tokens=max(round(share * self.tokens), 1)))
        name = f"{method.label}, attending to the share and reading more"
        return Policy.uniform(option, *self.shape[1:3], name=name)

    def at_equal_bytes(self, share: float, heads: dict[str, Floats]) -> dict[str, Any]:
        return self.compared(share, False, list(self._head_plans(share, heads)))

    def _head_plans(self, share: float, heads: dict[str, Floats]) -> Sequence[Policy]:
        budget, tokens = int(share * self.full), self.shape[0]
        rest = max(round(share / 2 * tokens), 8)
        kinds = {
            "RazorAttention": ("induction", Razor()),
            "DuoAttention's rule on retrieval heads": ("retrieval", StreamingLLM()),
            "RLKV": ("rlkv", StreamingLLM(sinks=16)),
        }
        found = [
            self._filled(budget, most_of(name, heads[score], method), heads[score].size, rest)
            for name, (score, method) in kinds.items()
            if score in heads
        ]
        mean = self._most(budget, 9, tokens, lambda m: headkv_plan(heads["retrieval"], m))
        by_mean = None if mean is None else headkv_plan(heads["retrieval"], mean)
        return [policy for policy in (by_mean, *found) if policy is not None]

    def _filled(
        self, budget: int, make: Callable[[int, int], Policy], heads: int, rest: int
    ) -> Policy | None:
        """As many heads in full as fit; then as many tokens of the others as still do."""
        count = self._most(budget, 1, heads, lambda n: make(n, rest))
        if count is None:
            return None
        more = self._most(budget, rest, self.tokens, lambda tokens: make(count, tokens))
        return make(count, more or rest)

    def _most(self, budget: int, low: int, high: int, make: Callable[[int], Policy]) -> int | None:
        """The largest number whose plan takes no more than the budget, by bisection."""
        best = None
        while low <= high:
            middle = (low + high) // 2
            if make(middle).footprint(self.shape[0], self.shape[-1]) <= budget:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best


def most_of(name: str, score: Floats, method: Method) -> Callable[[int, int], Policy]:
    """Return plans that keep ``count`` best-scored heads whole, and ``rest`` tokens of others."""
    return lambda count, rest: two_kinds(name, most(score, count / score.size), method, rest)


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
    parser.add_argument("--heads", type=Path, help="head scores with the score rlkv")
    arguments = parser.parse_args()
    begun = time.monotonic()
    found: dict[str, Any] = {"torch": torch.__version__, "no needle in the last": UNASKED_END}

    def record(name: str, part: Any) -> None:
        found[name] = part
        with atomic(arguments.out) as temporary:  # a run may be ended at any time
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def part(name: str, measure: Callable[[], Any]) -> None:
        if time.monotonic() - begun > arguments.seconds:
            say("out of time before", name)
            return
        attempt(record, name, measure)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.device, arguments.tiny, Path(folder))
        heads = scores_of(bench, arguments.tiny, arguments.heads)
        say("tables and head scores", f"{time.monotonic() - begun:.0f} s")
        found |= {"device": bench.loaded.device, "samples": len(bench.judges)}
        if "rlkv" not in heads:
            found["RLKV"] = "left out: no trained gates were given (--heads)"
        shares = SHARES[:1] if arguments.tiny else SHARES
        for share in shares:
            name = f"{100 * share:g} %"
            part(f"held {name}", lambda s=share: bench.at_equal_bytes(s, heads))
            part(f"read {name}", lambda s=share: bench.at_equal_reads(s, FIRST))
        for share in () if arguments.tiny else shares:
            name = f"read {100 * share:g} %, others"
            part(name, lambda s=share: bench.at_equal_reads(s, OTHERS))
    for name, each in found.items():
        for row in each["rows"] if isinstance(each, dict) and "rows" in each else ():
            say(name, row["policy"], row["kl"], row["needles"], row["held"], row["read"])


if __name__ == "__main__":
    main()
