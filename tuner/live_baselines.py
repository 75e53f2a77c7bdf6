"""The plan beside what it has to beat, at equal bytes, on samples no choice was made on.

Baselines are picked by replay on those very samples, which is generous to them: the uniform ones
in every method and precision, pyramid and AdaKV in those that did best there, and what has been
published since in its best precision, as far as the trace holds the signals that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.progress import Progress
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.tuner.allocate import Problem, solve
from kvtune.tuner.baselines import FAMILIES, Stored, candidates, strong_families
from kvtune.tuner.beside import ran_live, replayed
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.exchange import Choice
from kvtune.tuner.quality import ratio_interval
from kvtune.tuner.result import PLAN_FILE, Baseline
from kvtune.tuner.solver import evicts, policy_of
from kvtune.tuner.sources import QualitySource

if TYPE_CHECKING:
    from kvtune.traces.trace import Trace
    from kvtune.tuner.validate import Validation


class Compared(NamedTuple):
    """The plan, or a baseline, with its policy; None where the runtime cannot store it."""

    baseline: Baseline
    policy: Policy | None


def plan_of(
    policy: Policy,
    predicted: Estimate,
    prompt_bytes: int,
    host_bytes: int,
    by_kind: dict[str, Estimate],
) -> Compared:
    """The plan, as the first of what is compared."""
    found = Baseline(
        policy.name,
        "kvtune",
        predicted,
        None,
        prompt_bytes,
        by_kind=by_kind,
        policy=PLAN_FILE,
        host_bytes=host_bytes,
    )
    return Compared(found, policy)


def file_of(family: str) -> str:
    """Where a baseline's policy lies in the run directory."""
    return f"baselines/{family}.yaml"


def live_baselines(
    source: QualitySource,
    policy: Policy,
    chosen: Candidate,
    predicted: Estimate,
    progress: Progress,
) -> tuple[list[Compared], Validation]:
    """On the model itself: every family's best by replay, then all of them live, and the plan's.

    The family of a plan that is a rule is the plan itself.
    """
    trace, loaded, tables = source.trace, source.loaded, source.tables
    assert trace is not None  # noqa: S101 - own traces come with their model
    assert loaded is not None  # noqa: S101
    samples, rule = trace.of_split("evaluate"), tables.rule_of(chosen.choice)
    budget = policy.footprint(tables.prompt_tokens, tables.head_dim)
    on_host = policy.host_bytes(tables.prompt_tokens, tables.head_dim)
    rows = [
        plan_of(policy, predicted, budget, on_host, source.losses_by_kind_of(chosen.choice)),
        *(
            _allocated(source, family, choice, _own_bytes(source, choice))
            for family, choice in _allocations(source, budget + on_host).items()
        ),
        *(row for row in _best_of_families(
              source, trace, budget + on_host, progress)
          if rule is None or row.baseline.family != rule.family),
    ]  # fmt: skip
    policies = [row.policy for row in rows if row.policy is not None]
    found = ran_live(source, policies, samples, rounding=True, progress=progress)
    kinds = [sample.kind for sample in samples]
    measured = [
        _measured(row, live, None if live is found[0] else times_as_much(live, found[0], kinds))
        for row, live in zip(rows, found, strict=True)
    ]
    return measured, found[0]


def live_on_stack(
    source: QualitySource, plan: Compared, chosen: Candidate, progress: Progress
) -> tuple[Baseline, Validation]:
    """The plan on held-out samples as a stack runs it that stores answers as it stores prompts.

    Args:
        source: calibrated for the stack.
        plan: as kvtune's own runtime runs it.
        chosen: the same as a candidate.
        progress: told of every sample.
    """
    trace, loaded = source.trace, source.loaded
    assert trace is not None  # noqa: S101 - own traces come with their model
    assert loaded is not None  # noqa: S101
    assert plan.policy is not None  # noqa: S101 - plans always have one
    samples = trace.of_split("evaluate")
    (found,) = ran_live(
        source, [plan.policy], samples, stored_alike=True, rounding=True, progress=progress
    )
    there = replace(
        plan.baseline,
        predicted=source.loss_of(chosen.choice),
        by_kind=source.losses_by_kind_of(chosen.choice),
    )
    return _measured(Compared(there, plan.policy), found, None).baseline, found


def times_as_much(theirs: Validation, ours: Validation, kinds: Sequence[str]) -> Estimate | None:
    """How many times our live loss theirs is, with a 95 % interval over the same samples."""
    ratio, low, high = ratio_interval(theirs.losses, ours.losses, kinds)
    known = all(math.isfinite(each) for each in (ratio, low, high))
    return Estimate(ratio, low, high, "times", "live") if known else None


def _best_of_families(
    source: QualitySource, trace: Trace, budget: int, progress: Progress
) -> Iterator[Compared]:
    """Of each family, one rule for all heads, the one that replay on the held-out samples prefers.

    The uniform ones in all methods and precisions are tried coarsely, and those that did best there
    in full and under the other families' allocators; what others have published since, coarsely in
    all precisions and in full in its best. Each of the two steps reads the trace once.
    """
    tables, samples = source.tables, trace.of_split("evaluate")
    shape = (tables.prompt_tokens, tables.layers, tables.kv_heads, tables.head_dim)
    kinds = [sample.kind for sample in samples]

    def replay(tried: Mapping[str, Sequence[Policy]], every: int) -> dict[str, Any]:
        policies = [policy for each in tried.values() for policy in each]
        losses = replayed(source, samples, policies, every=every, progress=progress)
        ends = np.cumsum([len(each) for each in tried.values()])
        return dict(zip(tried, np.split(losses, ends[:-1]), strict=True))

    strong = {
        family: made
        for family in strong_families(trace.manifest["signals"])
        if (made := candidates(family, budget, *shape))
    }
    uniform = candidates("uniform", budget, *shape)
    coarse = replay({"uniform": uniform, **strong}, every=6)
    ranked = np.argsort(coarse["uniform"].mean(1))
    promising = {_stored_by(uniform[row]) for row in ranked[:_PROMISING]}
    finalists = {
        family: made
        for family in FAMILIES
        if (made := candidates(family, budget, *shape, only=promising))
    }
    for family, tried in strong.items():
        finalists[family] = [tried[int(coarse[family].mean(1).argmin())]]
    for family, losses in replay(finalists, every=1).items():
        best = int(losses.mean(1).argmin())
        yield _simple(source, family, finalists[family][best], losses[best], kinds)


def _allocated(source: QualitySource, family: str, choice: Choice, spent: int) -> Compared:
    """What another way to allocate the same options came to."""
    name = _NAMES[family]
    found = Baseline(
        name=name,
        family=family,
        predicted=source.loss_of(choice),
        live=None,
        prompt_bytes=spent,
        by_kind=source.losses_by_kind_of(choice),
        policy=file_of(family),
    )
    return Compared(found, policy_of(source.tables, choice, name))


def _simple(
    source: QualitySource, family: str, policy: Policy, losses: Any, kinds: Sequence[str]
) -> Compared:
    """One rule for all heads, replayed."""
    some = any(evicts(option) for option in policy.options())
    found = Baseline(
        name=policy.name,
        family=family,
        predicted=source.loss(losses, kinds, "replay", evicts=some),
        live=None,
        prompt_bytes=policy.footprint(source.tables.prompt_tokens, source.tables.head_dim),
        by_kind=source.losses_by_kind(losses, kinds, "replay", evicts=some),
        policy=file_of(family),
    )
    return Compared(found, policy)


def _measured(row: Compared, live: Validation, times: Estimate | None) -> Compared:
    """The same with what live runs have found."""
    found = replace(
        row.baseline,
        live=live.live,
        prompt_bytes=live.prompt_bytes,
        perplexity_change=live.perplexity_change,
        retrieval_accuracy=live.retrieval_accuracy,
        live_by_kind=live.by_kind,
        times_the_plan=times,
    )
    return Compared(found, row.policy)


_PROMISING = 2  # methods and precisions that the other families try, of the uniform ones
_NAMES = {"layers": "best per layer", "greedy": "greedy per head"}


def _allocations(source: QualitySource, budget: int) -> dict[str, Choice]:
    """One option a layer, and each head for itself without the terms between heads.

    All of them on the device: a plan's bytes on the host count in the budget, as for the families.
    """
    tables = source.tables
    here = np.flatnonzero([not option.on_host for option in tables.options])
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    problem = Problem.of(tables.of_split("search"), footprint).allowing(here)
    room = budget - footprint_of_lengths(1, tables.heads)
    try:
        return {
            "layers": here[np.repeat(solve(problem.tied(tables.kv_heads), room), tables.kv_heads)],
            "greedy": here[solve(problem.shrunk(0.0), room)],
        }
    except KvtuneError:  # a layer's smallest option may not fit where a head's does
        return {}


def _own_bytes(source: QualitySource, choice: Choice) -> int:
    tables = source.tables
    footprint = tables.footprints(tables.prompt_tokens, tables.head_dim)
    return int(footprint[choice].sum()) + footprint_of_lengths(1, tables.heads)


def _stored_by(policy: Policy) -> Stored:
    option = policy.heads[0][0]
    return option.method, option.keys
