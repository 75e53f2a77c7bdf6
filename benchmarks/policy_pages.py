"""Figures of papers' claims, of formats of few bits, and of caches sent and used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from page_tables import Figures, result, spaced, table

UNITS = {"cosine": "cosine", "asked_later": "points", "asked_before": "points"}
KINDS = ("prose", "code", "retrieval")
TIMED_AS = {"ape 0.9 0.9": "ape"}  # the wait is that of any temperature and scale
LEVELS = {
    "fine": "fine", "medium": "medium", "coarse": "coarse", "finer": "64 bins (ours)",
    "int4": "`int4`",
}  # fmt: skip


def claims() -> str:
    """What papers claim, as an H200 found it."""
    return claims_table(result("claims-h200.json")["claims"])


def claims_table(judged: Sequence[Figures]) -> str:
    """Claims with their verdicts and figures."""

    def row(found: Figures) -> Sequence[str]:
        if "skipped" in found:
            return found["claim"], f"skipped: {found['skipped']}", "-", "-"
        low, high = found["interval"]
        unit = UNITS.get(found["measure"], "nats/token")
        gain = f"{found['gain']:+.3g} [{low:+.2g}, {high:+.2g}] {unit}"
        return found["claim"], found["verdict"], gain, str(found["samples"])

    return table(("claim", "verdict", "gain", "samples"), map(row, judged))


def few_bits() -> str:
    """What formats of two to four bits lose with all tokens kept, least first."""
    live = result("formats-live-3-h200.json")["live"]
    rows = sorted(live.items(), key=lambda item: float(item[1]["KL"]))

    def row(name: str, found: Figures) -> Sequence[str]:
        kinds = [f"{sum(found[kind]) / len(found[kind]):.3g}" for kind in KINDS]
        times = _spread(found["times"], *found["times_interval"])
        return name, f"{found['bits an element']:.2f}", *kinds, _loss(found), times

    head = "", "bits", *KINDS, "mean KL", "`int2`'s loss over it"
    return table(head, (row(*item) for item in rows))


def all_methods() -> str:
    """Plans of the menu of three methods and of all, at equal bytes."""

    def row(share: str, found: Figures) -> Sequence[str]:
        plans = found["three methods"], found["all methods"]
        gain = found["gain"]
        better = f"{gain['samples_better']} of {gain['samples']}"
        losses = (_spread(plan["kl"], *plan["kl_interval"]) for plan in plans)
        digits = (plan["eight_needles"] for plan in plans)
        below = " / ".join(
            _points(each["points_below_full"], each["points_interval"]) for each in digits
        )
        return (
            spaced(share),
            *losses,
            _spread(gain["times"], *gain["times_interval"]),
            better,
            below,
        )

    head = (
        "KV bytes", "three methods", "all methods", "three / all", "samples better",
        "digits below the full cache, points: three / all",
    )  # fmt: skip
    return table(head, (row(*each) for each in result("all-methods-h200.json")["at"].items()))


def _points(value: float, ends: Sequence[float]) -> str:
    return f"{value:.1f} [{ends[0]:.1f}, {ends[1]:.1f}]"


def levels() -> str:
    """What CacheGen's levels take and lose."""
    found = result("transport-h200.json")["levels"]
    rows = [
        (words, f"{each['bits an element']:.2f}", f"{each['smaller than int8']:.2f} x", _loss(each))
        for name, words in LEVELS.items()
        if (each := found.get(name))
    ]
    return table(("", "bits an element", "smaller than `int8`", "KL"), rows)


def reuse() -> str:
    """What each way of reuse loses, and what wait for a first token it saves."""
    found = result("reuse-h200.json")

    def wait(name: str) -> Iterator[str]:
        for size in ("8B", "1B"):
            row = found["times"].get(size, {}).get(name)
            yield f"{row['first token, ms']:.0f}" if row else ""
            yield f"{100 * row['saved']:.0f} %" if row else ""

    rows = [
        (name, _loss(row), f"{100 * row['digits right']:.1f}", *wait(TIMED_AS.get(name, name)))
        for name, row in found["quality"].items()
        if "KL" in row
    ]
    head = "", "KL", "digits right, %", "8B: first token, ms", "saved", "1B", "saved"
    return table(head, rows)


def _loss(found: dict[str, Any]) -> str:
    return _spread(found["KL"], found["low"], found["high"])


def _spread(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"
