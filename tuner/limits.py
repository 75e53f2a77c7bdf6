"""Hard limits on what a plan costs, kept to by the very figures that are printed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from kvtune.common.errors import DoesNotFitError
from kvtune.common.words import figure

if TYPE_CHECKING:
    from kvtune.common.estimate import Estimate
    from kvtune.simulator.cost import Cost
    from kvtune.tuner.candidate import Candidate

MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Limits:
    """What a plan may cost at most, and how much it must serve; None for no limit.

    Args:
        time_per_token_s: of a decode step of all sequences (``--tpot``).
        first_token_s: of reading and compressing one prompt (``--ttft``).
        sequences: that must fit at once, at least (``--sequences``).
    """

    time_per_token_s: float | None = None
    first_token_s: float | None = None
    sequences: int | None = None

    @property
    def are_set(self) -> bool:
        """Whether there is any."""
        return self != Limits()

    def excess(self, cost: Cost, sequences: int) -> dict[str, float]:
        """By which share of each limit a plan is beyond it; negative where it keeps to it."""
        found = {}
        for name, limit, taken in (
            ("--tpot", self.time_per_token_s, cost.latency.value),
            ("--ttft", self.first_token_s, cost.first_token.value),
        ):
            if limit is not None:
                found[name] = taken / limit - 1
        if self.sequences is not None:
            found["--sequences"] = 1 - sequences / self.sequences
        return found

    def at(self, name: str, excess: float) -> str:
        """The limit that a plan with this excess would keep to, as it is written."""
        if name == "--sequences":
            assert self.sequences is not None  # noqa: S101 - an excess of it was found
            return f"{name} {round(self.sequences * (1 - excess))}"
        limit = self.time_per_token_s if name == "--tpot" else self.first_token_s
        assert limit is not None  # noqa: S101 - likewise
        return f"{name} {_rounded_up(limit * (1 + excess) * MILLISECONDS):g}ms"


def _rounded_up(number: float) -> float:
    """Three digits, never less than the number: a limit that is quoted must admit the plan."""
    step = 10.0 ** (floor(log10(number)) - 2)
    return round(ceil(number / step * (1 - 1e-12)) * step, 12)


Excess = Callable[["Candidate"], dict[str, float]]


def no_limits(_: Candidate) -> dict[str, float]:
    """The excess of plans that nothing limits."""
    return {}


def within(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Candidates that keep to every limit."""
    return [candidate for candidate in candidates if not candidate.misses]


def none_within(
    limits: Limits,
    candidates: Sequence[Candidate],
    largest_kl: float,
    band: Callable[[Candidate], Estimate | None],
) -> DoesNotFitError:
    """The error that says how near all plans come, and names limits for which there is a plan.

    That one is of plans with one option for all heads, where there are any: they are tried in every
    search, so that what is quoted is found again. Of these it is the nearest of plans that lose no
    more than is accepted, if any.

    Args:
        limits: that no plan keeps to.
        candidates: that were tried.
        largest_kl: that is accepted, nats/token.
        band: of a plan's loss; None where one number is known.
    """
    steady = [each for each in candidates if "uniform" in each.parameters] or list(candidates)
    accepted = [each for each in steady if each.kl <= largest_kl]
    best = min(accepted or steady, key=lambda each: sum(each.misses.values()))
    more = "" if accepted else f", more than --max-kl {largest_kl:g}"
    nearest = " ".join(limits.at(name, excess) for name, excess in best.misses.items())
    loss = band(best)
    kl = f"{best.kl:.2g}" if loss is None else figure(loss, tier=False)
    return DoesNotFitError(
        f"no plan keeps to all limits; {_nearest(candidates)}",
        hint=f"{nearest} has a plan: {best.sequences} of {best.context} tokens at once, KL "
        f"{kl} nats a token{more}.",
    )


def note_on(candidates: Sequence[Candidate]) -> list[str]:
    """How many plans miss a limit, and by how little; nothing where all keep to them."""
    missing = [candidate for candidate in candidates if candidate.misses]
    if not missing:
        return []
    return [
        f"limits: {len(missing)} of {len(candidates)} plans miss one and were left out; "
        f"{_nearest(missing)}."
    ]


def _nearest(missing: Sequence[Candidate]) -> str:
    """By how much the plan that comes nearest misses the limits."""
    nearest = min(missing, key=lambda each: sum(each.misses.values()))
    beyond = " and ".join(f"{name} by {100 * by:.2g} %" for name, by in nearest.misses.items())
    return f"the nearest misses {beyond}"


def with_excess(candidate: Candidate, excess: Excess) -> Candidate:
    """The candidate with how far it is beyond every limit."""
    return replace(candidate, excess=excess(candidate))
