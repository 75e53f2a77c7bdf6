"""Plans at equal bytes under several search settings, from which selection samples choose."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, Protocol, TypeVar

import numpy as np
from outcomes import Outcome

from kvtune.policies.policy import Policy
from kvtune.simulator.quality.tables import Tables
from kvtune.traces.samples import Sample
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.solver import policy_of

EMPHASES = (1.0, 4.0)  # how much retrieval counts beside prose and code
HARDLY_MORE = 1.15  # plans that lose up to so many times the least are told apart by their needles

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Variant:
    """One way to search: which options, how much of the cross terms, how much retrieval counts."""

    name: str
    columns: np.ndarray
    shrinkage: float
    emphasis: float = 1.0
    tied: bool = False


@dataclass(frozen=True)
class Plan:
    """A variant's plan at a share of the bf16 bytes, and the loss predicted on selection."""

    share: float
    variant: Variant
    policy: Policy
    predicted: float
    seconds: float


class Live(Protocol):
    """Runs policies on samples."""

    def __call__(self, policies: Sequence[Policy], samples: Sequence[Sample]) -> list[Outcome]: ...


@dataclass(frozen=True)
class Choice(Generic[Key]):
    """What was picked, and what was seen on the selection samples.

    Args:
        plans: the pick of every group.
        losses: name -> predicted and live KL, nats a token, of all plans.
        points: name -> needle digits right, in points below the full cache, of the close ones.
    """

    plans: dict[Key, Plan]
    losses: dict[str, tuple[float, float]]
    points: dict[str, float]


def variants(tables: Tables, menu: str = "all options") -> list[Variant]:
    """Search settings: with and without 16-bit sinks, three weights of the cross terms, two of
    retrieval."""
    everything = np.arange(len(tables.options))
    plain = np.flatnonzero([not getattr(o.keys, "exact_first", 0) for o in tables.options])
    return [
        Variant(f"{name}, cross terms {share}, retrieval x{emphasis:g}", columns, share, emphasis)
        for name, columns in ((menu, everything), ("no exact sinks", plain))
        for share, emphasis in product((0.0, 0.2, 0.4), EMPHASES)
    ]


def one_option_a_layer(tables: Tables) -> Variant:
    """An ablation: all heads of a layer choose alike."""
    return Variant("one option a layer", np.arange(len(tables.options)), 0.2, tied=True)


def search(
    tables: Tables, shares: Sequence[float], wanted: Sequence[Variant]
) -> tuple[list[Plan], float]:
    """Every variant at every share, and the seconds it took to reduce the tables once."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    fit, check = tables.of_split("search"), tables.of_split("select")
    started = time.monotonic()
    problems = {
        emphasis: Problem.of(fit, footprint, emphasis={"retrieval": emphasis})
        for emphasis in EMPHASES
    }
    reduced = (time.monotonic() - started) / len(EMPHASES)
    every = product(shares, wanted)
    return [_solve(check, problems[v.emphasis], v, share) for share, v in every], reduced


def _solve(check: Tables, problem: Problem, variant: Variant, share: float) -> Plan:
    full = 4 * check.heads * check.head_dim * check.prompt_tokens
    heads, started = check.kv_heads, time.monotonic()
    part = problem.allowing(variant.columns).shrunk(variant.shrinkage)
    picked = solve(part.tied(heads) if variant.tied else part, int(share * full) - 4 * check.heads)
    choice = variant.columns[np.repeat(picked, heads) if variant.tied else picked]
    seconds = time.monotonic() - started
    policy = policy_of(check, choice, f"{variant.name} at {share:.0%}")
    predicted = float(check.sample_weights() @ check.by_sample(choice))
    return Plan(share, variant, policy, predicted, seconds)


def choose(
    groups: Mapping[Key, Sequence[Plan]],
    live: Live,
    samples: Sequence[Sample],
    needles: Sequence[Sample],
) -> Choice[Key]:
    """Of every group's plans that lose least live, or hardly more, that with most digits right."""
    found = [plan for plans in groups.values() for plan in plans]
    kl = dict(zip(map(id, found), (o.mean_kl for o in _run(live, found, samples)), strict=True))
    close = {key: _close(plans, kl) for key, plans in groups.items()}
    asked = [plan for plans in close.values() for plan in plans]
    points = {
        id(plan): float(outcome.points.mean()) if outcome.digits else 0.0
        for plan, outcome in zip(asked, _run(live, asked, needles), strict=True)
    }
    picked = {
        key: min(plans, key=lambda plan: (points[id(plan)], kl[id(plan)]))
        for key, plans in close.items()
    }
    return Choice(
        picked,
        {plan.policy.name: (plan.predicted, kl[id(plan)]) for plan in found},
        {plan.policy.name: points[id(plan)] for plan in asked},
    )


def _run(live: Live, plans: Sequence[Plan], samples: Sequence[Sample]) -> list[Outcome]:
    return live([plan.policy for plan in plans], samples)


def _close(plans: Sequence[Plan], kl: Mapping[int, float]) -> list[Plan]:
    least = min(kl[id(plan)] for plan in plans)
    return [plan for plan in plans if kl[id(plan)] <= HARDLY_MORE * least]
