"""A stand-in's plan beside other rules, as far as they ran live on the source model.

All of them decide at run time, from the prompt, so that none needs to know the model's heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.common.progress import Progress
from kvtune.policies.page_formats import CODES
from kvtune.policies.policy import Policy
from kvtune.tuner.band import band_of_live
from kvtune.tuner.baselines import FAMILIES, PRECISIONS, STRONG, candidates
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.live_baselines import Compared, file_of, plan_of
from kvtune.tuner.result import Baseline
from kvtune.tuner.solver import Solver
from kvtune.tuner.source_models import STAND_IN
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.verdict import OWN_FAMILY


def stand_in_baselines(
    source: QualitySource,
    solver: Solver,
    policy: Policy,
    chosen: Candidate,
    predicted: Estimate,
    progress: Progress,
) -> tuple[list[Compared], None]:
    """The plan, and every family at its bytes, or at the most it takes; nothing is run.

    Of what has been published since the simple families, those that lose less than these and the
    plan. A rule that the runtime can store comes with its policy.
    """
    plan = plan_of(policy, predicted, chosen.prompt_bytes, source.by_kind(chosen.choice))
    share = chosen.prompt_bytes / solver.question.full_bytes(chosen.context)
    found = [
        _compared(row, solver, chosen.context, share) for row in _families(source, share, FAMILIES)
    ]
    least = min([predicted.value, *(row.baseline.predicted.value for row in found)])
    strong = [
        _compared(row, solver, chosen.context, share)
        for row in _families(source, share, STRONG)
        if row.loss.value < least
    ]
    return [plan, *found, *strong], None


@dataclass(frozen=True)
class _Row:
    """What a family's curve says at a share: its best rule there, its loss, its largest share."""

    family: str
    name: str
    loss: Estimate
    most: float


def _compared(row: _Row, solver: Solver, context: int, share: float) -> Compared:
    """A family's best rule as a baseline, with its policy where it can run."""
    whole = solver.question.full_bytes(context)
    spent = round(min(share, row.most) * whole)
    policy = _policy(row, solver, context, spent)
    file = None if policy is None else file_of(row.family)
    baseline = Baseline(_said(row.name), row.family, row.loss, None, spent, policy=file)
    return Compared(baseline, policy)


def _said(name: str) -> str:
    """What a curve's row is called, by the measured point that is nearest.

    The uniform rules' is no rival: the plan is one of them, and this is what they lost when run.
    """
    nearest = f"{name}{_unless_it_runs(name)}"
    if name.split()[0] == OWN_FAMILY:
        rule = nearest.removeprefix(f"{OWN_FAMILY} ")
        return f"uniform rules, run live (nearest: {rule})"
    return f"{nearest}, live on {STAND_IN}"


def _policy(row: _Row, solver: Solver, context: int, spent: int) -> Policy | None:
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


def _families(source: QualitySource, share: float, among: Iterable[str]) -> Iterator[_Row]:
    """Families that are something of their own at this share.

    Where all tokens fit in few bits a family has nothing to divide: its best is uniform's.
    """
    for family in among:
        points = source.curves.get(family, [])
        if points and share >= _share(points[0]):
            nearest = min(points, key=lambda point: abs(np.log(_share(point) / share)))
            if _is_its_own(family, nearest["name"]):
                loss = loss_at(points, share, family)
                yield _Row(family, nearest["name"], loss, _share(points[-1]))


def _is_its_own(family: str, name: str) -> bool:
    """Whether a rule's name, its allocator and then its method, is one of the family's own.

    Whatever divides budgets and keeps everything is the uniform rule of that format.
    """
    allocator, method = (*name.split(), "")[:2]
    if family in STRONG:
        return method == family
    return allocator == family and (method != "full" or family == "uniform")


def _unless_it_runs(stored: str) -> str:
    """A mark on rules whose format the runtime has no pages for: the curves were run with some."""
    form = stored.rsplit(" ", 1)[-1].partition("+")[0]
    return "" if form in CODES else " (simulated only)"


def loss_at(points: Sequence[dict[str, Any]], share: float, family: str = "uniform") -> Estimate:
    """A family's band at a share, straight between measured points in logarithms.

    Beyond the last point it is that point's: more bytes than it takes do no harm.
    """
    column = np.log([_share(point) for point in points])
    bands = [
        band_of_live(point["kl"], point["kl_interval"], point.get("kl_by_kind", {}), family)
        for point in points
    ]

    def between(end: str) -> float:
        values = np.log(np.maximum([getattr(each, end) for each in bands], 1e-9))
        return float(np.exp(np.interp(np.log(share), column, values)))

    first = bands[0]
    return Estimate(between("value"), between("low"), between("high"), first.unit, first.tier)


def _share(point: dict[str, Any]) -> float:
    """Of the bf16 bytes that a measured policy took; at most what it was allowed, ``at``."""
    return float(point.get("share", point["at"]))
