"""A plan of ``kvtune search --held-bytes`` beside single methods, over long generations.

    python benchmarks/long_plans.py --device cuda --prompts 8 --seconds 540 \
        --out benchmarks/results/long-plans-h200.json
    python benchmarks/long_plans.py --device cpu --tiny --seconds 120 --out /tmp/long.json

The bound is a share of the full cache's mean bytes, and a plan may hold no more at any moment; each
single method has the largest budget whose *mean* bytes are within that share, and may peak higher.
Tables are replayed on samples with long observed parts, in processes side by side, the finalists
generate on selection prompts, and plan and methods then on prompts that neither has seen; prompts
generate as one batch. Last, with the time that is left, ``--bounded`` short generations of the plan
alone count how often the bytes held rose above the bound. What is done when ``--seconds`` are over
is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import workers
from long_generation import fitting
from long_tasks import SHORT, Batch, Part, generated, replayed_beside_plain, tables_of

from kvtune.common.errors import KvtuneError
from kvtune.common.files import write_json
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.runtime.live_policies import LivePolicy
from kvtune.simulator.quality.tables import join
from kvtune.traces.geometry import Geometry
from kvtune.traces.models import load_model
from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build
from kvtune.tuner.long.bound import mean_full_bytes
from kvtune.tuner.long.live import live_policy
from kvtune.tuner.long.menu import LongMenu
from kvtune.tuner.long.plans import Generated, LongPlan, candidates, finalists
from kvtune.tuner.quality import mean_interval, mean_over_kinds, ratio_interval

SINGLE = {"a2sf 0.95": PREFILL, "tova": Tova()}
"""The two that lose least at a tenth of the bytes in ``results/long-generation-cpu.json``."""
TOGETHER = 10  # generations that only ask whether the bound holds, side by side


def single_methods(geometry: Any, asked: Generated, share: float) -> list[LivePolicy]:
    """Each method alone, in 16 bits, at the same share of mean bytes."""
    found = []
    for name, method in SINGLE.items():
        budget = fitting(method, asked.prompt_tokens, asked.tokens, geometry.head_dim, share)
        if budget:
            option = Option(method, Budget(tokens=budget))
            found.append(
                LivePolicy(Policy.uniform(option, geometry.layers, geometry.kv_heads, name=name))
            )
    return found


def uniform_in_format(plans: list[LongPlan], asked: Generated) -> LivePolicy | None:
    """The best uniform plan within the bound, if it stores fewer than 16 bits."""
    best = next((plan for plan in plans if plan.is_uniform), None)
    if best is None or best.policy.heads[0][0].keys.bits == 16:
        return None
    return live_policy(best.policy, asked)


def summary(parts: list[Part], bound: int, full: float) -> Part:
    """Each policy over all prompts, and how many times the plan's loss each loses."""
    kinds = [part["kind"] for part in parts]
    losses = {
        run["name"]: [part["runs"][at]["kl"] for part in parts]
        for at, run in enumerate(parts[0]["runs"])
    }
    plan = next(iter(losses.values()))
    found: Part = {}
    for at, (name, kl) in enumerate(losses.items()):
        runs = [part["runs"][at] for part in parts]
        found[name] = {
            "kl": mean_over_kinds(kl, kinds),
            "kl_interval": mean_interval(kl, kinds),
            "times_the_plan": ratio_interval(kl, plan, kinds),
            "share_of_mean_bytes": float(np.mean([r["mean_bytes"] for r in runs])) / full,
            "peak_over_bound": max(r["peak_bytes"] for r in runs) / bound,
            "kl_by_quarter": np.mean([r["kl_by_quarter"] for r in runs], 0).tolist(),
            "agreement": float(np.mean([r["agreement"] for r in runs])),
            "evicted_mean": float(np.mean([r["evicted_mean"] for r in runs])),
        }
    return found


def samples_of(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, list[Sample]]:
    each = -(-arguments.prompts // 2)
    counts = {
        "search": {"prose": arguments.search, "code": arguments.search},
        "select": {"prose": 1, "code": 1},
        "evaluate": {"prose": each, "code": each},
    }
    tokens = arguments.prompt_tokens + arguments.observed
    built = build(Workload(counts, tokens=tokens, observed=arguments.observed), tokenizer)
    return {
        split: by_turns([s for s in built if s.split == split])
        for split in ("search", "select", "evaluate")
    }


@dataclass
class Run:
    """What the stages of one measurement share.

    Args:
        arguments: of the command line.
        crew: processes on the device.
        samples: by split.
        asked: the generation that is planned for.
        started: when, by ``time.monotonic()``.
        out: what is written after every stage.
    """

    arguments: argparse.Namespace
    crew: Any
    samples: dict[str, list[Sample]]
    asked: Generated
    started: float
    out: Part

    def at(self, share: float) -> float:
        """When a share of the time has passed."""
        return self.started + share * float(self.arguments.seconds)

    def note(self, words: str) -> None:
        """Say what has been done, and write what there is."""
        print(f"{time.monotonic() - self.started:.0f} s: {words}", file=sys.stderr, flush=True)
        write_json(self.arguments.out, self.out)


def measure(arguments: argparse.Namespace, out: Part) -> None:
    """Search plans, choose one live, set it beside others, and hold it to its bound."""
    started, menu = time.monotonic(), LongMenu(residual=arguments.residual)
    if arguments.tiny:
        menu = replace(
            menu, methods=menu.methods[:2], shares=(1 / 16, 1 / 4), formats=menu.formats[:2]
        )
    place = workers.Place(arguments.model, arguments.device, arguments.out.parent)
    with workers.Crew(place, arguments.workers) as crew:
        loaded = load_model(arguments.model, dtype="float32")
        crew.model_is_stored()
        geometry, samples = loaded.geometry, samples_of(arguments, loaded.tokenizer)
        heads = geometry.layers * geometry.kv_heads
        prompt, tokens = arguments.prompt_tokens, arguments.tokens
        full = mean_full_bytes(prompt, tokens, heads, geometry.head_dim)
        asked = Generated(prompt, tokens, int(arguments.share * full), menu)
        out |= {"bound_bytes": asked.bound_bytes, "full_mean_bytes": full, "faults": []}
        run = Run(arguments, crew, samples, asked, started, out)
        found = searched(run)
        plan = chosen(run, found)
        compared(run, plan, found, geometry, full)
        out["faults"] += [str(failure) for failure in crew.failures]
        bounded(run, plan)
        run.note("done")


def searched(run: Run) -> list[LongPlan]:
    """Plans by replay of as many samples as there is time for."""
    order = [*run.samples["select"], *run.samples["search"]]
    parts = [part for _, part in run.crew.until(run.at(0.45), tables_of, order, run.asked.menu)]
    if not parts:
        raise KvtuneError("no sample's tables were made in time", hint="give more --seconds.")
    found = candidates(join(parts), run.asked)
    run.out["candidates"] = {
        p.name: {"predicted": p.predicted, "most_bytes": p.most_bytes} for p in found
    }
    run.note(f"{len(found)} candidates")
    return found


def chosen(run: Run, found: list[LongPlan]) -> LongPlan:
    """The finalist that loses least live on the selection prompts; the first if none ran."""
    select, tried = [Batch("select", tuple(run.samples["select"]))], finalists(found)
    policies, prompt = [live_policy(p.policy, run.asked) for p in tried], run.asked.prompt_tokens
    stop = time.monotonic() + 0.2 * run.arguments.seconds
    for _, beside in run.crew.until(stop, replayed_beside_plain, select, policies, prompt):
        run.out["replayed_beside_plain"] = beside
        run.note(f"replayed beside plain: {beside}")
    task = policies, prompt, min(run.arguments.live_tokens, run.asked.tokens), stop
    answers = run.crew.until(stop + 15, generated, select, *task)
    live, plan = [part for _, parts in answers for part in parts], tried[0]
    if live:
        run.out["live_steps"] = live[0]["steps"] | {"tokens": live[0]["tokens"]}
        losses = np.mean([[r["kl"] for r in part["runs"]] for part in live], 0)
        plan = tried[int(losses.argmin())]
        run.out["live_rounds"] = {p.name: float(x) for p, x in zip(tried, losses, strict=True)}
    run.out["plan"] = {"name": plan.name, "options": counted(plan)}
    run.note(f"plan: {plan.name}")
    return plan


def compared(
    run: Run, plan: LongPlan, found: list[LongPlan], geometry: Geometry, full: float
) -> None:
    """The plan, the best single methods and the best uniform option on held-out prompts."""
    arguments, asked, out = run.arguments, run.asked, run.out
    uniform = uniform_in_format(found, asked)
    policies = [
        live_policy(replace(plan.policy, name="plan"), asked),
        *single_methods(geometry, asked, arguments.share),
        *([uniform] if uniform else []),
    ]
    hand_back = run.at(0.88) if arguments.bounded else run.at(1) - 15
    held_out = [Batch("held out", tuple(run.samples["evaluate"][: arguments.prompts]))]
    task = policies, asked.prompt_tokens, asked.tokens, hand_back
    for _, done in run.crew.until(hand_back + 12, generated, held_out, *task):
        out["contenders"] = summary(done, asked.bound_bytes, full)
        out["prompts"] = [{k: v for k, v in p.items() if k != "runs"} for p in done]
        run.note(f"{done[0]['tokens']} tokens of each of {len(done)} prompts: {done[0]['steps']}")


def counted(plan: LongPlan) -> dict[str, int]:
    """How many heads have each option."""
    labels = [option.label for row in plan.policy.heads for option in row]
    return {label: labels.count(label) for label in sorted(set(labels))}


def bounded(run: Run, plan: LongPlan) -> None:
    """Short generations from many prompts: the most bytes that each ever held, over the bound."""
    asked, count, end = run.asked, run.arguments.bounded, run.at(1)
    texts = [*run.samples["evaluate"], *run.samples["search"]]
    many = [
        replace(texts[n % len(texts)], id=f"bounded-{n}",
                token_ids=texts[n % len(texts)].token_ids[n // len(texts):])
        for n in range(count)
    ]  # fmt: skip
    batches = [
        Batch(f"bounded {at}", tuple(many[at : at + TOGETHER]))
        for at in range(0, len(many), TOGETHER)
    ]
    task = [live_policy(plan.policy, asked)], asked.prompt_tokens, SHORT, end - 5
    ratios: list[float] = []
    for _, parts in run.crew.until(end, generated, batches, *task):
        ratios += [part["runs"][0]["peak_bytes"] / asked.bound_bytes for part in parts]
    run.out["bounded"] = {
        "generations": len(ratios), "tokens": SHORT, "above_the_bound": sum(r > 1 for r in ratios),
        "largest_over_bound": max(ratios, default=None),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--search", type=int, default=2, help="samples a kind to fit on")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--observed", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--live-tokens", type=int, default=1536)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--residual", type=int, default=16)
    parser.add_argument("--bounded", type=int, default=100)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long-plans-h200.json"))
    arguments = parser.parse_args()
    if arguments.tiny:
        sizes = {"workers": 2, "prompts": 2, "search": 1, "prompt_tokens": 96, "observed": 48}
        sizes |= {"tokens": 64, "live_tokens": 16, "residual": 4, "bounded": 3}
        vars(arguments).update(sizes)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    out: Part = {k: v for k, v in vars(arguments).items() if k != "out"}
    try:
        measure(arguments, out)
    finally:
        write_json(arguments.out, out)
    print(json.dumps(out.get("contenders"), indent=1))


if __name__ == "__main__":
    main()
