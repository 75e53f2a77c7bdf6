"""What each part of the allocation is worth, on the packaged tables, and how fast it is.

    python benchmarks/allocation.py --out benchmarks/results/allocation-cpu.json
    python benchmarks/allocation.py --parts speed small_cases   # these alone are measured anew

Every variant allocates the packaged SmolLM2 tables (90 KV heads, 170 options) at four sizes on the
search samples; its loss is that of the tables on samples that were held out, with all terms between
heads, and its ratio to the variant that is in use, on the same samples, with a 95 % interval.
``price descent`` was in use before: a bisection of the byte price with coordinate sweeps. ``speed``
scores random configurations, and allocates 80 layers x 8 KV heads x 60 options at one budget; its
processor time tells what two free cores do, also while others use them. ``small_cases`` compares
made-up problems of five to seven heads with the best of all their configurations.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.files import write_json
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.allocate import Problem, priced, solve
from kvtune.tuner.exchange import Choice, exchange
from kvtune.tuner.quality import mean_over_kinds, ratio_interval
from kvtune.tuner.source_models import packaged_tables

SHARES = (0.03, 0.06, 0.12, 0.25)
IN_USE = "in use"
Solve = Callable[[Problem, int], Choice]


def price_descent(problem: Problem, budget: int) -> Choice:
    """Coordinate sweeps at a byte price that is bisected, from each head alone."""
    best = current = priced(problem, budget)
    least = problem.value(best)
    low, high = 1e-16, 1e-4
    for _ in range(24):
        price = float(np.sqrt(low * high))
        current = sweeps(problem, price, current)
        if problem.spent(current) > budget:
            low = price
            continue
        high = price
        if (value := problem.value(current)) < least:
            best, least = current.copy(), value
    return best


def sweeps(problem: Problem, price: float, start: Choice) -> Choice:
    """Every head in turn takes its best option at a price, with what the others have."""
    choice = start.copy()
    total = problem.factor[np.arange(len(choice)), choice].sum(0)
    base = problem.loss + price * problem.footprint
    for _ in range(3):
        for head in range(len(choice)):
            factor = problem.factor[head]
            others = total - factor[choice[head]]
            best = int((base[head] + 2 * problem.shrinkage * (factor @ others)).argmin())
            total = others + factor[best]
            choice[head] = best
    return choice


VARIANTS: dict[str, Solve] = {
    IN_USE: solve,
    "hull of each head": priced,
    "without terms between heads": lambda p, b: solve(p.shrunk(0.0), b),
    "all of the terms between heads": lambda p, b: solve(p.shrunk(1.0), b),
    "without restarts": lambda p, b: exchange(p, b, priced(p, b)),
    "price descent instead of restarts": lambda p, b: exchange(p, b, price_descent(p, b)),
    "price descent alone": price_descent,
}


def ablation(tables: Tables) -> list[dict[str, Any]]:
    """Every variant at every size."""
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint)
    full = 4 * tables.heads * tables.head_dim * tables.prompt_tokens
    held_out = tables.of_split("evaluate")
    kinds = [sample.kind for sample in held_out.samples]
    rows = []
    for share in SHARES:
        budget = int(share * full) - 4 * tables.heads
        base: Any = None
        for name, way in VARIANTS.items():
            started = time.process_time()
            choice = way(problem, budget)
            seconds = time.process_time() - started
            losses = held_out.by_sample(choice)
            base = losses if name == IN_USE else base
            value, low, high = ratio_interval(losses, base, kinds)
            rows.append(
                {
                    "share": share, "variant": name, "cpu_s": seconds,
                    "fitted": problem.value(choice), "held_out": mean_over_kinds(losses, kinds),
                    "times_in_use": value, "interval": [low, high],
                    "spent": problem.spent(choice) / budget,
                }
            )  # fmt: skip
    return rows


def scored_per_second(tables: Tables) -> dict[str, Any]:
    """Random configurations scored in batches of 16,384: by processor time, and by the clock.

    A processor second counts what both threads ran, not what they waited while others had the
    cores. Two cores have two of them a second.
    """
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint)
    rng = np.random.default_rng(0)
    choices = rng.integers(0, len(tables.options), (16_384, tables.heads))
    wall, cpu = [], []
    for _ in range(9):
        started = time.monotonic(), time.process_time()
        problem.values(choices)
        wall.append(time.monotonic() - started[0])
        cpu.append(time.process_time() - started[1])
    each = float(np.median(cpu)) / len(choices)
    return {
        "rank": problem.factor.shape[-1],
        "configurations": len(choices) * len(cpu),
        "processor_seconds": sum(cpu),
        "processor_microseconds_each": 1e6 * each,
        "per_processor_second": 1 / each,
        "per_second_on_two_free_cores": 2 / each,
        "per_second_by_the_clock": len(choices) / float(np.median(wall)),
        "cores_that_it_had": sum(cpu) / sum(wall),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def small_cases() -> list[dict[str, Any]]:
    """How far the worst answer is from the best of all configurations, by size."""
    from kvtune.tests.test_tuner_allocate import brute_force, budget_at, random_problem

    found = []
    for heads, options, seeds in ((5, 4, 25), (6, 5, 25), (7, 5, 5)):
        beyond, seconds = [], []
        for seed, share, shrinkage in product(range(seeds), (0.1, 0.3, 0.6, 0.9), (0.0, 0.4, 1.0)):
            problem = random_problem(seed, heads, options, shrinkage=shrinkage)
            budget = budget_at(problem, share)
            started = time.process_time()
            value = problem.value(solve(problem, budget))
            seconds.append(time.process_time() - started)
            beyond.append(value / brute_force(problem, budget) - 1)
        found.append(
            {
                "heads": heads, "options": options, "cases": len(beyond),
                "worst_beyond_optimum": max(beyond),
                "more_than_a_percent_beyond": sum(each > 0.01 for each in beyond),
                "cpu_s_median": float(np.median(seconds)),
            }
        )  # fmt: skip
    return found


def speed(tables: Tables) -> dict[str, Any]:
    """Scoring and one large allocation."""
    wide = replace(tables, factor=np.repeat(tables.factor, 6, axis=-1)[..., :64])
    return {
        "scored": scored_per_second(tables),
        "scored_with_64_features": scored_per_second(wide),
        "large": large(),
    }


def large(layers: int = 80, kv_heads: int = 8, options: int = 60, rank: int = 64) -> Any:
    """A made-up problem of a large model's size at one budget."""
    rng = np.random.default_rng(0)
    heads = layers * kv_heads
    footprint = np.sort(rng.integers(1_000, 4_000_000, options))
    size = (footprint.max() / footprint) ** 0.5 * rng.lognormal(0, 0.8, (heads, 1))
    shape = (heads, options, rank)
    factor = (1e-3 * size[..., None] * rng.standard_normal(shape, np.float32)).astype(np.float32)
    problem = Problem((factor**2).sum(-1), factor, footprint)
    budget = int(0.1 * footprint.max() * heads)
    started = time.monotonic(), time.process_time()
    choice = solve(problem, budget)
    return {
        "heads": heads, "options": options, "rank": rank,
        "wall_s": time.monotonic() - started[0], "cpu_s": time.process_time() - started[1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "spent": problem.spent(choice) / budget,
        "times_hull": problem.value(choice) / problem.value(priced(problem, budget)),
    }  # fmt: skip


PARTS: dict[str, Callable[[Tables], Any]] = {
    "ablation": ablation,
    "speed": speed,
    "small_cases": lambda _: small_cases(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allocation-cpu.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for part in arguments.parts:
        found[part] = PARTS[part](packaged_tables()[0])
        write_json(arguments.out, found)
    for row in found["ablation"]:
        low, high = row["interval"]
        print(
            f"{row['share']:.0%} {row['variant']:34} held out {row['held_out']:.5f}, "
            f"{row['times_in_use']:.3f} [{low:.3f}, {high:.3f}] times, {row['cpu_s']:.2f} s"
        )
    print(found["speed"], found["small_cases"])


if __name__ == "__main__":
    main()
