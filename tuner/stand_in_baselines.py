"""A stand-in's plan beside other rules, as far as they ran live on the source model.

All of them decide at run time, from the prompt, so that none needs to know the model's heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvtune.common.estimate import Estimate
from kvtune.policies.page_formats import CODES
from kvtune.policies.policy import Policy
from kvtune.tuner.baselines import FAMILIES, PRECISIONS, STRONG, candidates
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.curves import Row, rows_at
from kvtune.tuner.live_baselines import Compared, file_of, plan_of
from kvtune.tuner.result import Baseline
from kvtune.tuner.solver import Solver
from kvtune.tuner.source_models import STAND_IN
from kvtune.tuner.sources import QualitySource

LIVE_ON = f", live on {STAND_IN}"
"""What the names of such rules end with."""


def stand_in_baselines(
    source: QualitySource,
    solver: Solver,
    policy: Policy,
    chosen: Candidate,
    predicted: Estimate,
) -> list[Compared]:
    """The plan, and every family at its bytes, or at the most it takes; nothing is run.

    Of what has been published since the simple families, those that lose less than these and the
    plan. A rule that the runtime can store comes with its policy.
    """
    by_kind = source.losses_by_kind_of(chosen.choice)
    on_host = policy.host_bytes(chosen.context, solver.question.head_dim)
    plan = plan_of(policy, predicted, chosen.prompt_bytes, on_host, by_kind)
    share = (chosen.prompt_bytes + on_host) / solver.question.full_bytes(chosen.context)
    rule = source.tables.rule_of(chosen.choice)
    length = chosen.context / source.tables.prompt_tokens

    def compared(among: Iterable[str]) -> Iterator[Compared]:
        for row in rows_at(source.curves, share, among, length):
            if rule is None or row.family != rule.family:  # else the plan itself
                yield _compared(row, solver, chosen.context, share)

    found = list(compared(FAMILIES))
    least = min([predicted.value, *(row.baseline.predicted.value for row in found)])
    strong = [row for row in compared(STRONG) if row.baseline.predicted.value < least]
    return [plan, *found, *strong]


def _compared(row: Row, solver: Solver, context: int, share: float) -> Compared:
    """A family's best rule as a baseline, with its policy where it can run."""
    whole = solver.question.full_bytes(context)
    spent = round(min(share, row.most) * whole)
    policy = _policy(row, solver, context, spent)
    file = None if policy is None else file_of(row.family)
    name = f"{row.name}{_unless_it_runs(row.name)}{LIVE_ON}"
    return Compared(Baseline(name, row.family, row.loss, None, spent, policy=file), policy)


def _policy(row: Row, solver: Solver, context: int, spent: int) -> Policy | None:
    """The rule filled to its bytes for this model; None where the runtime has no pages for it."""
    tables, head_dim = solver.question.tables, solver.question.head_dim
    shape = context, tables.layers, tables.kv_heads, head_dim
    stored = {
        (method, form)
        for _, method in (FAMILIES | STRONG)[row.family]
        for form in PRECISIONS
        if form.label == row.name.rsplit(" ", 1)[-1]
    }
    made = candidates(row.family, spent, *shape, stored)
    return next((policy for policy in made if policy.name == row.name), None)


def _unless_it_runs(stored: str) -> str:
    """A mark on rules whose format the runtime has no pages for: the curves were run with some."""
    form = stored.rsplit(" ", 1)[-1].partition("+")[0]
    return "" if form in CODES else " (simulated only)"
