"""Plans at equal bytes under several search settings, from which selection samples choose."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product

import numpy as np

from kvtune.policies.policy import Policy
from kvtune.simulator.tables import Tables
from kvtune.tuner.allocate import Problem, solve

EMPHASES = (1.0, 4.0)  # how much retrieval counts beside prose and code


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


def variants(tables: Tables) -> list[Variant]:
    """Search settings, and an ablation: one option for all heads of a layer."""
    everything = np.arange(len(tables.options))
    plain = np.flatnonzero([not getattr(o.keys, "exact_first", 0) for o in tables.options])
    found = [
        Variant(f"{name}, cross terms {share}, retrieval x{emphasis:g}", columns, share, emphasis)
        for name, columns in (("all options", everything), ("no exact sinks", plain))
        for share, emphasis in product((0.0, 0.2, 0.4), EMPHASES)
    ]
    return [*found, Variant("one option a layer", everything, 0.2, tied=True)]


def search(tables: Tables, shares: tuple[float, ...]) -> tuple[list[Plan], float]:
    """Every variant at every share, and the seconds it took to reduce the tables once."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    fit, started = tables.of_split("search"), time.monotonic()
    problems = {
        emphasis: Problem.of(fit, footprint, emphasis={"retrieval": emphasis})
        for emphasis in EMPHASES
    }
    reduced = (time.monotonic() - started) / len(EMPHASES)
    every = product(shares, variants(tables))
    return [_solve(tables, problems[v.emphasis], v, share) for share, v in every], reduced


def _solve(tables: Tables, problem: Problem, variant: Variant, share: float) -> Plan:
    full = 4 * tables.heads * tables.head_dim * tables.prompt_tokens
    heads, check, started = tables.kv_heads, tables.of_split("select"), time.monotonic()
    part = problem.allowing(variant.columns).shrunk(variant.shrinkage)
    picked = solve(part.tied(heads) if variant.tied else part, int(share * full) - 4 * tables.heads)
    choice = variant.columns[np.repeat(picked, heads) if variant.tied else picked]
    seconds = time.monotonic() - started
    rows = choice.reshape(-1, heads)
    options = tuple(tuple(tables.options[o] for o in row) for row in rows)
    policy = Policy(f"{variant.name} at {share:.0%}", options)
    predicted = float(check.sample_weights() @ check.by_sample(choice))
    return Plan(share, variant, policy, predicted, seconds)
