"""What families of rules lost when they ran live on a stand-in's source, at any share of the bytes.

A family was run at some shares, each time in the method and precision that had done best there on
other samples. Between two of them losses lie on a straight line in logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtune.common.estimate import Estimate
from kvtune.policies.allocator import Allocator
from kvtune.policies.format import Format
from kvtune.policies.method import Method
from kvtune.tuner.band import band_of_live
from kvtune.tuner.baselines import FAMILIES, PRECISIONS, STRONG, family_of

Points = Sequence[dict[str, Any]]
"""A family's measured points, smallest share first."""
Curves = Mapping[str, Points]


@dataclass(frozen=True)
class Row:
    """What a family's curve says at a share.

    Args:
        family: of rules.
        name: of the rule that was measured nearest to the share.
        loss: at the share, as a band.
        by_kind: the same by kind of text, without a band.
        most: the largest share that the family has a use for.
    """

    family: str
    name: str
    loss: Estimate
    by_kind: dict[str, float]
    most: float

    @property
    def keeps_all(self) -> bool:
        """Whether the rule keeps every token."""
        return _is_full(self.name)

    def stored(self) -> tuple[Allocator, Method, Format] | None:
        """The parts of the rule; None of one that this version cannot run."""
        parts = (
            (allocator, method, form)
            for allocator, method in (FAMILIES | STRONG)[self.family]
            for form in PRECISIONS
            if self.name in _names(allocator, method, form)
        )
        return next(parts, None)


def _names(allocator: Allocator, method: Method, form: Format) -> tuple[str, str]:
    """What a rule is called, and what it is called where it keeps everything."""
    family = family_of(allocator)
    return f"{family} {method.label} {form.label}", f"{family} full {form.label}"


def rows_at(
    curves: Curves, share: float, among: Iterable[str], length: float = 1.0
) -> Iterator[Row]:
    """Families that are something of their own at this share.

    Where all tokens fit in few bits a family has nothing to divide: its best is uniform's. First
    tokens in 16 bits are as many in a short prompt and take more of its bytes, so that the
    precision there is that of as many bytes in the source's prompts, not of the same share.

    Args:
        curves: of families.
        share: of the bf16 bytes.
        among: families.
        length: of a prompt over that of the source's.
    """
    stored = share * min(length, 1.0)
    for family in among:
        points = curves.get(family, [])
        able = [
            point for point in points if not (_is_full(point["name"]) and share_of(point) > share)
        ]
        if able and share >= share_of(points[0]):
            nearest = min(able, key=lambda point: abs(np.log(share_of(point) / stored)))
            if _is_its_own(family, nearest["name"]):
                yield row_at(points, share, family, nearest["name"])


def _is_full(name: str) -> bool:
    return name.split()[1] == "full"


def row_at(points: Points, share: float, family: str, name: str) -> Row:
    """What a family's curve says at a share of the rule of this name."""
    return Row(
        family,
        name,
        loss_at(points, share, family),
        _by_kind_at(points, share),
        share_of(points[-1]),
    )


def _is_its_own(family: str, name: str) -> bool:
    """Whether a rule's name, its allocator and then its method, is one of the family's own.

    Whatever divides budgets and keeps everything is the uniform rule of that format.
    """
    allocator, method = (*name.split(), "")[:2]
    if family in STRONG:
        return method == family
    return allocator == family and (method != "full" or family == "uniform")


def loss_at(points: Points, share: float, family: str = "uniform") -> Estimate:
    """A family's band at a share, straight between measured points in logarithms.

    Beyond the last point it is that point's: more bytes than it takes do no harm.
    """
    bands = [
        band_of_live(point["kl"], point["kl_interval"], point.get("kl_by_kind", {}), family)
        for point in points
    ]

    def between(end: str) -> float:
        return _between(points, share, [getattr(each, end) for each in bands])

    first = bands[0]
    return Estimate(between("value"), between("low"), between("high"), first.unit, first.tier)


def _by_kind_at(points: Points, share: float) -> dict[str, float]:
    """A family's loss by kind of text at a share, whose mean is the family's."""
    kinds = points[0].get("kl_by_kind", {})
    found = {
        kind: _between(points, share, [point["kl_by_kind"][kind] for point in points])
        for kind in kinds
    }
    mean = _between(points, share, [point["kl"] for point in points])
    level = mean / float(np.mean(list(found.values()))) if found else 1.0
    return {kind: level * loss for kind, loss in found.items()}


def _between(points: Points, share: float, losses: Sequence[float]) -> float:
    column = np.log([share_of(point) for point in points])
    values = np.log(np.maximum(losses, 1e-9))
    return float(np.exp(np.interp(np.log(share), column, values)))


def share_of(point: Mapping[str, Any]) -> float:
    """Of the bf16 bytes that a measured policy took; at most what it was allowed, ``at``."""
    return float(point.get("share", point["at"]))
