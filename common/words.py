"""Figures in words: every one with its interval and tier, in the unit people read."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from kvtune.common.estimate import BAND, Estimate
from kvtune.common.units import format_bytes, format_seconds


def figure(estimate: Estimate | None, *, tier: bool = True) -> str:
    """``0.0029 [0.0021, 0.0040] live``; ``-`` for a figure that there is not.

    Of a band the ends alone are shown, ``0.0021 to 0.0400``.
    """
    if estimate is None:
        return "-"
    if estimate.tier == BAND and estimate.low < estimate.high:
        text = f"{_two_digits(estimate.low)} to {_two_digits(estimate.high)}"
        return f"{text}, {estimate.tier}" if tier else text
    show = _SHOWN.get(estimate.unit, _digits)
    text = show(estimate.value)
    if estimate.tier != "exact" and (estimate.low, estimate.high) != (estimate.value,) * 2:
        text += f" [{', '.join(_ends(estimate))}]"
    return f"{text} {estimate.tier}" if tier else text


def _ends(estimate: Estimate) -> tuple[str, str]:
    """The ends of an interval: two digits, or three where two would leave the value outside."""
    low, high = estimate.low, estimate.high
    inside = float(f"{low:.2g}") <= estimate.value <= float(f"{high:.2g}")
    show = _SHOWN.get(estimate.unit, _two_digits if inside else _digits)
    return show(low), show(high)


def percent(share: float) -> str:
    """``6.2 %``, with as many digits as small shares need."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.5 else f"{value:.3g} %"


def accuracy(estimate: Estimate | None) -> str:
    """``89 [84, 92] %``; ``-`` for one that there is not."""
    if estimate is None:
        return "-"
    value, low, high = (round(100 * end) for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}] %"


def printable(text: str) -> str:
    """``text`` with control characters spelt out, so that no name from a file drives a terminal.

    Line ends and tabs stay; marks that reverse the direction of writing are spelt out too.
    """
    return "".join(c if c in "\n\t" or not _steers(c) else _spelt(c) for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _spelt(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def count(number: float) -> str:
    """Whole numbers in groups of three."""
    return f"{round(number):,}".replace(",", " ")


def _digits(value: float) -> str:
    """Three digits that count; whole numbers from a thousand on."""
    return count(value) if abs(value) >= 1000 else f"{value:.3g}"


def _two_digits(value: float) -> str:
    return _digits(value) if abs(value) >= 100 else f"{value:.2g}"


_SHOWN: dict[str, Callable[[float], str]] = {
    "B": format_bytes,
    "s": format_seconds,
    "prompts": count,
    "tokens": count,
}
