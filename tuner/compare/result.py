"""What a comparison has found: each strategy's held-out loss against the time it had used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.tuner.compare.setting import Prepared


@dataclass(frozen=True)
class Point:
    """What a strategy would have handed over at a time.

    Args:
        seconds: on its clock.
        kl: live on the held-out samples, nats/token, with a 95 % interval.
    """

    seconds: float
    kl: Estimate


@dataclass(frozen=True)
class Times:
    """How many times another strategy's loss one's own is, on the same held-out samples.

    Args:
        value: the ratio of the means.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_apart(self) -> bool:
        """Whether the interval says that the two differ."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Outcome:
    """One strategy at one size.

    Args:
        strategy: its name.
        words: what it does.
        asked_share: of the bf16 bytes, that a plan may take.
        share: that its plan takes; None where it had no plan in time.
        plans_run: configurations that it ran live to choose.
        points: its held-out loss as time went on, the last is its plan's.
        times_the_tuner: its loss over that of ``kvtune search``; None without the two.
        policy: its plan.
    """

    strategy: str
    words: str
    asked_share: float
    share: float | None
    plans_run: int
    points: tuple[Point, ...]
    times_the_tuner: Times | None
    policy: Policy | None

    @property
    def kl(self) -> Estimate | None:
        """Of the plan it ended with."""
        return self.points[-1].kl if self.points else None


@dataclass(frozen=True)
class Comparison:
    """All strategies at all sizes.

    Args:
        model: its name.
        device: where it ran.
        workload: what its samples are.
        seconds: that every strategy had at every size.
        prepared: what trace and tables took, with which the clocks of some begin.
        held_out_samples: behind every loss.
        outcomes: size by size.
    """

    model: str
    device: str
    workload: str
    seconds: float
    prepared: Prepared
    held_out_samples: int
    outcomes: tuple[Outcome, ...]

    @property
    def shares(self) -> list[float]:
        """The sizes that have outcomes, smallest first."""
        return sorted({outcome.asked_share for outcome in self.outcomes})

    def at(self, share: float) -> list[Outcome]:
        """The outcomes of one size."""
        return [outcome for outcome in self.outcomes if outcome.asked_share == share]

    def sentences(self) -> Iterator[str]:
        """For each size, whom ``kvtune search`` beats and whom it does not, by the intervals."""
        for share in self.shares:
            compared = [o for o in self.at(share) if o.times_the_tuner and o.strategy != "tuner"]
            if compared:
                yield f"At {100 * share:g} %: {'; '.join(map(_said, compared))}."


def _said(outcome: Outcome) -> str:
    times = outcome.times_the_tuner
    assert times is not None  # noqa: S101 - chosen by the caller
    between = (
        f"{times.value:.2g} times the loss of kvtune search ({times.low:.2g}-{times.high:.2g})"
    )
    if not times.is_apart:
        return f"{outcome.words} is not told apart, {between}"
    return f"{outcome.words} is {'worse' if times.low > 1 else 'better'}, {between}"
