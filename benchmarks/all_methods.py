"""What the tuned plan gains when a head may have any method: three methods against all of them.

    python benchmarks/all_methods.py --device cuda --size full --workers 6 --seconds 325

One trace, one set of tables: both menus have the same shares and formats, and the small one is
the large one's columns. At 3 / 6 / 12 % of the bf16 bytes either menu's plan is picked as
``quality.py`` picks its own: searched on the search samples under twelve settings (retrieval
counting once or four times among them), then, of those that lose least live on the selection
samples, the one with most needle digits right on others. What was picked runs live in float32 on
evaluation samples and needles that no step before has seen. The gain is how many times the large
menu's loss the small one's is, with a bootstrap interval over samples, pair by pair; answers are
8-needle digits in points below the full cache.

Samples are spread over processes and taken by turns, so that a bound on time leaves out some of
every kind; what was found is written after each.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from divisions import Division, divided
from outcomes import Outcome, points_below_full, times_as_much, used
from plans import Choice, Plan, choose, search, variants

from kvtune.common.errors import KvtuneError
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.methods.full import Full
from kvtune.policies.policy import Policy
from kvtune.simulator.quality.tables import Tables, join
from kvtune.traces.models import LoadedModel, load_model
from kvtune.traces.samples import Sample
from kvtune.tuner.options import FULL, METHODS, Menu, every_method

SHARES = (0.03, 0.06, 0.12)
THREE, ALL = "three methods", "all methods"
TABLES_BY, PICKED_BY, MEASURED_BY = 0.6, 0.82, 0.97  # of the time there is

REDUCED = Menu(
    METHODS,
    (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
    (
        (Bf16(), Bf16()),
        (Int4(), Int4()),
        (Int4(exact_first=4), Int4(exact_first=4)),
        (Int4(exact_first=4), Int2(exact_first=4)),
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is run: samples of each kind a split, needles beside them, tokens and probes."""

    per_kind: tuple[int, int, int]
    select_needles: int
    needles: int
    tokens: int
    observed: int
    probes: int
    menu: Menu


SIZES = {
    "tiny": Size((1, 1, 1), 1, 2, 192, 32, 2, replace(REDUCED, shares=(1 / 32, 1 / 4))),
    "small": Size((1, 1, 4), 2, 8, 1024, 128, 4, REDUCED),
    "full": Size((8, 4, 8), 16, 64, 2048, 256, 16, FULL),  # quality.py's
}


@dataclass
class Bench:
    """One run: what it measured so far, written after every step."""

    out: Path
    loaded: LoadedModel
    crew: workers.Crew
    division: Division
    size: Size
    started: float
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)

    def record(self, **figures: Any) -> None:
        self.found |= {**figures, "seconds": round(time.monotonic() - self.started, 1)}
        if self.crew.failures:
            self.found["failures"] = self.crew.failures
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"[{self.found['seconds']:7.1f} s] {', '.join(figures)}", flush=True)

    def at(self, share: float) -> float:
        """When so much of the time is over."""
        return self.started + share * self.seconds

    @property
    def menu(self) -> Menu:
        return replace(self.size.menu, methods=every_method())

    def live(
        self, policies: Sequence[Policy], samples: Sequence[Sample], share: float
    ) -> Iterator[tuple[Sample, list[Any]]]:
        """Runs of every sample as they come, until so much of the time is over."""
        return self.crew.until(self.at(share), workers.live, samples, list(policies))

    def add(self, outcomes: Sequence[Outcome], sample: Sample, runs: Sequence[Any]) -> None:
        geometry = self.loaded.geometry
        full = 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * sample.prompt
        for outcome, run in zip(outcomes, runs, strict=True):
            outcome.add(sample, run, full)


def measure(bench: Bench) -> None:
    """Tables, plans, and the plans live."""
    menu, loaded = bench.menu, bench.loaded
    bench.record(
        model=loaded.name,
        device="cpu" if loaded.device == "cpu" else torch.cuda.get_device_name(),
        dtype=loaded.dtype,
        workload=bench.division.workload,
        probes=bench.size.probes,
        methods=[method.label for method in menu.methods],
        options=len(menu.options()),
    )
    choice = pick(bench, tables_of(bench))
    bench.record(
        picked={name_of(key): plan.policy.name for key, plan in choice.plans.items()},
        plans_on_selection=choice.losses,
        needles_on_selection=choice.points,
    )
    evaluate(bench, choice.plans)


def tables_of(bench: Bench) -> Tables:
    """Every option of the menu replayed on search and selection samples, as many as time allows."""
    menu, samples = bench.menu, bench.division.of("search", "select")
    task = (workers.captured_tables, samples, menu.options(), menu.needs, bench.size.probes)
    parts: list[Tables] = []
    for sample, part in bench.crew.until(bench.at(TABLES_BY), *task):
        parts.append(part)
        bench.record(tables_of=[*bench.found.get("tables_of", ()), sample.id])
    splits = {facts.split for part in parts for facts in part.samples}
    if splits != {"search", "select"}:
        why = "; ".join(bench.crew.failures) or "time was up"
        raise KvtuneError(f"tables of {len(parts)} samples are not enough to search: {why}")
    return join(parts)


def pick(bench: Bench, tables: Tables) -> Choice[tuple[str, float]]:
    """Either menu's plan at every share."""
    of_three = [option.method in (*METHODS, Full()) for option in tables.options]
    menus = {THREE: tables.with_options(np.flatnonzero(of_three).tolist()), ALL: tables}
    groups: dict[tuple[str, float], list[Plan]] = {}
    for name, part in menus.items():
        plans, _ = search(part, SHARES, variants(part, name))
        for plan in plans:
            named = replace(plan.policy, name=f"{name}: {plan.policy.name}")
            groups.setdefault((name, plan.share), []).append(replace(plan, policy=named))
    bench.record(plans=sum(map(len, groups.values())))
    seen: list[int] = []  # selection samples, then needles beside them

    def live(policies: Sequence[Policy], samples: Sequence[Sample]) -> list[Outcome]:
        outcomes = [Outcome() for _ in policies]
        for sample, runs in bench.live(policies, samples, PICKED_BY):
            bench.add(outcomes, sample, runs)
        seen.append(len(outcomes[0].kl))
        bench.record(picked_on=seen)
        if not seen[0]:
            raise KvtuneError("no plan was run on a selection sample", hint="allow more seconds.")
        return outcomes

    division = bench.division
    return choose(groups, live, division.of("select"), division.select_needles)


def evaluate(bench: Bench, plans: dict[tuple[str, float], Plan]) -> None:
    """The picked plans live on held-out samples of all kinds, then on more needles."""
    plain = bench.division.of("evaluate")
    samples = [*plain, *(s for s in bench.division.needles if s not in plain)]
    losses, answers = ({key: Outcome() for key in plans} for _ in range(2))
    policies = [plan.policy for plan in plans.values()]
    for sample, runs in bench.live(policies, samples, MEASURED_BY):
        if sample in plain:
            bench.add(list(losses.values()), sample, runs)
        if sample in bench.division.needles:
            bench.add(list(answers.values()), sample, runs)
        bench.record(at=compared(plans, losses, answers))


def compared(
    plans: dict[tuple[str, float], Plan],
    losses: dict[tuple[str, float], Outcome],
    answers: dict[tuple[str, float], Outcome],
) -> dict[str, Any]:
    """Both menus' plans at every share, and what the larger menu gains."""
    found: dict[str, Any] = {}
    for (name, share), plan in plans.items():
        key = name, share
        found.setdefault(f"{share:.0%}", {})[name] = described(plan, losses[key], answers[key])
    for share in SHARES:
        pair = losses[THREE, share], losses[ALL, share]
        if pair[0].kl:
            found[f"{share:.0%}"]["gain"] = gain(*pair)
    return found


def described(plan: Plan, loss: Outcome, answer: Outcome) -> dict[str, Any]:
    methods = Counter(option.method.label for option in plan.policy.options())
    return {
        "variant": plan.policy.name,
        **(loss.summary() if loss.kl else {}),
        "eight_needles": retrieval(answer) if answer.digits else None,
        "heads_of_methods": dict(methods.most_common()),
        "options": used(plan.policy),
    }


def retrieval(answer: Outcome) -> dict[str, Any]:
    """Digits right of all held-out needles, paired with the full cache."""
    return {
        "digits": float(np.mean(answer.digits)),
        "full_digits": float(np.mean(answer.full_digits)),
        **points_below_full(answer),
        "samples": len(answer.digits),
    }


def gain(three: Outcome, every: Outcome) -> dict[str, Any]:
    """The small menu's loss beside the large one's."""
    times, interval = times_as_much(three, every)
    return {
        "times": times,
        "times_interval": interval,
        "samples_better": int(np.sum(np.array(three.kl) > np.array(every.kl))),
        "samples": len(every.kl),
    }


def name_of(key: tuple[str, float]) -> str:
    return f"{key[0]} at {key[1]:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="be done by then")
    parser.add_argument("--scratch", type=Path, help="for traces, one a process at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/all-methods.json"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    run(arguments, time.monotonic())


def run(arguments: argparse.Namespace, started: float) -> None:
    size = SIZES[arguments.size]
    with tempfile.TemporaryDirectory(dir=arguments.scratch, ignore_cleanup_errors=True) as scratch:
        place = workers.Place(arguments.model, arguments.device, Path(scratch))
        with workers.Crew(place, arguments.workers) as crew:
            loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
            crew.model_is_stored()
            division = divided(
                loaded.tokenizer,
                size.per_kind,
                select_needles=size.select_needles,
                needles=size.needles,
                tokens=size.tokens,
                observed=size.observed,
            )
            seconds = arguments.seconds
            measure(Bench(arguments.out, loaded, crew, division, size, started, seconds))


if __name__ == "__main__":
    main()
