"""A stand-in's plan beside other simple rules, as far as they ran live on the source model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.common.progress import Progress
from kvtune.policies.pages import CODES
from kvtune.policies.policy import Policy
from kvtune.tuner.band import band_of_live
from kvtune.tuner.baselines import FAMILIES
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.live_baselines import Compared, plan_of
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
    """The plan, and every family at its bytes, or at the most it takes; nothing is run."""
    plan = plan_of(policy, predicted, chosen.prompt_bytes, source.by_kind(chosen.choice))
    whole = solver.question.full_bytes(chosen.context)
    share = chosen.prompt_bytes / whole
    found = (
        Compared(Baseline(_said(name), family, loss, None, round(min(share, most) * whole)), None)
        for family, name, loss, most in _families(source, share)
    )
    return [plan, *found], None


def _said(name: str) -> str:
    """What a curve's row is called, by the measured point that is nearest.

    The uniform rules' is no rival: the plan is one of them, and this is what they lost when run.
    """
    nearest = f"{name}{_unless_it_runs(name)}"
    if name.split()[0] == OWN_FAMILY:
        rule = nearest.removeprefix(f"{OWN_FAMILY} ")
        return f"uniform rules, run live (nearest: {rule})"
    return f"{nearest}, live on {STAND_IN}"


def _families(source: QualitySource, share: float) -> Iterator[tuple[str, str, Estimate, float]]:
    """Family, name, loss and largest share of those that are something of their own at this share.

    Where all tokens fit in few bits a family has nothing to divide: its best is uniform's.
    """
    for family in FAMILIES:
        points = source.curves.get(family, [])
        if points and share >= _share(points[0]):
            nearest = min(points, key=lambda point: abs(np.log(_share(point) / share)))
            if nearest["name"].split()[0] == family:
                yield family, nearest["name"], loss_at(points, share), _share(points[-1])


def _unless_it_runs(stored: str) -> str:
    """A mark on rules whose format the runtime has no pages for: the curves were run with some."""
    form = stored.rsplit(" ", 1)[-1].partition("+")[0]
    return "" if form in CODES else " (simulated only)"


def loss_at(points: Sequence[dict[str, Any]], share: float) -> Estimate:
    """A family's band at a share, straight between measured points in logarithms.

    Beyond the last point it is that point's: more bytes than it takes do no harm.
    """
    column = np.log([_share(point) for point in points])
    bands = [
        band_of_live(point["kl"], point["kl_interval"], point.get("kl_by_kind", {}))
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
