"""The plan beside what it has to beat, at equal bytes, on samples no choice was made on.

Baselines are picked by replay on those very samples, which is generous to them: the uniform ones
in every method and precision, pyramid and AdaKV in those that did best there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.progress import Progress
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.runtime.kernels.layout import CODES
from kvtune.tuner.allocate import Choice, Problem, solve
from kvtune.tuner.baselines import FAMILIES, Stored, candidates
from kvtune.tuner.explore.record import by_kind
from kvtune.tuner.quality import estimate
from kvtune.tuner.question import Candidate, Solver, policy_of
from kvtune.tuner.request import Rival
from kvtune.tuner.sources import QualitySource

if TYPE_CHECKING:
    from kvtune.traces.trace import Trace
    from kvtune.tuner.validate import Validation


def stand_in_rivals(
    source: QualitySource,
    solver: Solver,
    policy: Policy,
    chosen: Candidate,
    predicted: Estimate,
    progress: Progress,
) -> tuple[list[Rival], None]:
    """From tables alone: allocations predicted, simple families read off their live curves."""
    question = solver.question
    problem = solver.problems[chosen.context]
    share = chosen.prompt_bytes / question.full_bytes(chosen.context)
    plan = Rival("kvtune plan", "kvtune", predicted, None, chosen.prompt_bytes, policy=policy)
    rivals = [replace(plan, by_kind=_held_out_by_kind(source, chosen.choice))]
    budget = chosen.prompt_bytes - footprint_of_lengths(1, source.tables.heads)
    for family, choice in _allocations(problem, source.tables.kv_heads, budget).items():
        spent = problem.spent(choice) + footprint_of_lengths(1, source.tables.heads)
        rivals.append(_allocated(source, family, choice, spent))
    for family in FAMILIES:
        if (point := _on_curve(source.curves.get(family, []), share)) is not None:
            name, figure = point
            stored = name.split(" ", 1)[1]  # a family's whole prompt bears the name of uniform's
            named = f"{family} {stored}{_unless_it_runs(stored)}"
            rivals.append(Rival(named, family, figure, None, chosen.prompt_bytes))
    return rivals, None


def _unless_it_runs(stored: str) -> str:
    """A mark on rules whose format the runtime has no pages for: the curves were run with some."""
    form = stored.rsplit(" ", 1)[-1].partition("+")[0]
    return "" if form in CODES else " (simulated only)"


def live_rivals(
    source: QualitySource,
    solver: Solver,
    policy: Policy,
    chosen: Candidate,
    predicted: Estimate,
    progress: Progress,
) -> tuple[list[Rival], Validation | None]:
    """On the model itself: every family's best by replay, then all of them live."""
    from kvtune.runtime.prompts import traced_prompt
    from kvtune.tuner.validate import validate_policies

    trace, loaded, tables = source.trace, source.loaded, source.tables
    assert trace is not None  # noqa: S101 - own traces come with their model
    assert loaded is not None  # noqa: S101
    samples = trace.of_split("evaluate")
    budget = policy.footprint(tables.prompt_tokens, tables.head_dim)
    plan = Rival(policy.name, "kvtune", predicted, None, budget, policy=policy)
    rows = [
        replace(plan, by_kind=_held_out_by_kind(source, chosen.choice)),
        *(
            _allocated(source, family, choice, _own_bytes(source, choice))
            for family, choice in _own_allocations(source, budget).items()
        ),
        *_best_of_families(source, trace, loaded.device, budget, progress),
    ]
    run = [row for row in rows if loaded.device != "cpu" or row.family in _LIVE_ON_CPU]
    found = validate_policies(
        [row.policy for row in run if row.policy is not None],
        loaded,
        samples,
        lambda sample: traced_prompt(trace, trace.sample(sample.id), loaded.device),
        progress=progress,
    )
    lives = dict(zip((row.family for row in run), found, strict=True))
    return [_measured(row, lives.get(row.family)) for row in rows], found[0]


def _best_of_families(
    source: QualitySource, trace: Trace, device: str, budget: int, progress: Progress
) -> Iterator[Rival]:
    """Of each family, one rule for all heads, the one that replay on the held-out samples prefers.

    The uniform ones in all methods and precisions are tried coarsely, and those that did best there
    in full and under the other families' allocators.
    """
    from kvtune.simulator.evaluate import replay_policies

    tables, samples = source.tables, trace.of_split("evaluate")
    shape = (tables.prompt_tokens, tables.layers, tables.kv_heads, tables.head_dim)
    kinds = [sample.kind for sample in samples]

    def replay(policies: Sequence[Policy], every: int = 1) -> Any:
        return replay_policies(
            trace, samples, policies, every=every, device=device, progress=progress
        )

    uniform = candidates("uniform", budget, *shape)
    ranked = np.argsort(replay(uniform, every=6).mean(1))
    promising = {_stored_by(uniform[row]) for row in ranked[:_PROMISING]}
    for family in FAMILIES:
        if tried := candidates(family, budget, *shape, only=promising):
            losses = replay(tried)
            best = int(losses.mean(1).argmin())
            yield _simple(source, family, tried[best], losses[best], kinds)


def _allocated(source: QualitySource, family: str, choice: Choice, spent: int) -> Rival:
    """What another way to allocate the same options came to."""
    name = _NAMES[family]
    return Rival(
        name=name,
        family=family,
        predicted=_held_out(source, choice),
        live=None,
        prompt_bytes=spent,
        by_kind=_held_out_by_kind(source, choice),
        policy=policy_of(source.tables, choice, name),
    )


def _simple(
    source: QualitySource, family: str, policy: Policy, losses: Any, kinds: Sequence[str]
) -> Rival:
    """One rule for all heads, replayed."""
    return Rival(
        name=policy.name,
        family=family,
        predicted=_calibrated(source, losses, kinds),
        live=None,
        prompt_bytes=policy.footprint(source.tables.prompt_tokens, source.tables.head_dim),
        by_kind=by_kind(losses, kinds, source.calibration.value),
        policy=policy,
    )


def _measured(rival: Rival, live: Validation | None) -> Rival:
    """The same with what live runs have found, if it was run."""
    if live is None:
        return rival
    return replace(
        rival,
        live=live.live,
        prompt_bytes=live.prompt_bytes,
        perplexity_change=live.perplexity_change,
        retrieval_accuracy=live.retrieval_accuracy,
        live_by_kind=live.by_kind,
    )


_LIVE_ON_CPU = ("kvtune", "uniform", "adakv")  # a run costs seconds there; the rest is replayed
_PROMISING = 2  # methods and precisions that the other families try, of the uniform ones
_NAMES = {"layers": "best per layer", "greedy": "greedy per head"}


def _allocations(problem: Problem, kv_heads: int, budget: int) -> dict[str, Choice]:
    """One option a layer, and each head for itself without the terms between heads."""
    try:
        return {
            "layers": np.repeat(solve(problem.tied(kv_heads), budget), kv_heads),
            "greedy": solve(problem.shrunk(0.0), budget),
        }
    except KvtuneError:  # a layer's smallest option may not fit where a head's does
        return {}


def _own_allocations(source: QualitySource, budget: int) -> dict[str, Choice]:
    tables = source.tables
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint)
    room = budget - footprint_of_lengths(1, tables.heads)
    return _allocations(problem, tables.kv_heads, room)


def _held_out(source: QualitySource, choice: Choice) -> Estimate:
    tables = source.tables.of_split("evaluate")
    return _calibrated(source, tables.by_sample(choice), [s.kind for s in tables.samples], "table")


def _held_out_by_kind(source: QualitySource, choice: Choice) -> dict[str, float]:
    tables = source.tables.of_split("evaluate")
    kinds = [sample.kind for sample in tables.samples]
    return by_kind(tables.by_sample(choice), kinds, source.calibration.value)


def _own_bytes(source: QualitySource, choice: Choice) -> int:
    tables = source.tables
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    return int(footprint[choice].sum()) + footprint_of_lengths(1, tables.heads)


def _calibrated(
    source: QualitySource, losses: Any, kinds: Sequence[str], tier: Any = "replay"
) -> Estimate:
    return source.calibration.apply(estimate(losses, kinds, tier))


def _stored_by(policy: Policy) -> Stored:
    option = policy.heads[0][0]
    return option.method, option.keys


def _on_curve(points: Sequence[dict[str, Any]], share: float) -> tuple[str, Estimate] | None:
    """A family's loss at a share, straight between measured points in logarithms; else nothing."""
    at = [point["at"] for point in points]
    if not points or not at[0] <= share <= at[-1]:
        return None
    column = np.log(at)

    def between(values: Sequence[float]) -> float:
        return float(np.exp(np.interp(np.log(share), column, np.log(np.maximum(values, 1e-9)))))

    nearest = min(points, key=lambda point: abs(np.log(point["at"] / share)))
    low, high = zip(*(point["kl_interval"] for point in points), strict=True)
    figure = Estimate(
        between([point["kl"] for point in points]),
        between(low),
        between(high),
        "nats/token",
        "interpolated",
    )
    return nearest["name"], figure
