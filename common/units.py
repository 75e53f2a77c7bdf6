"""Units: bytes with GB and GiB kept apart, token counts, times. One formatter for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from kvtune.common.errors import KvtuneError

KIB, MIB, GIB = 2**10, 2**20, 2**30
KB, MB, GB = 10**3, 10**6, 10**9

MOST_BYTES, MOST_TOKENS = 2**60, 2**32  # beyond any machine, and any prompt
_LONGEST = 24

Amount = str | int
"""Bytes or tokens: as people write them, ``16GB`` and ``32k``, or a number of them."""

_BYTE_UNITS = {
    "b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
}  # fmt: skip
_QUANTITY = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(amount: Amount) -> int:
    """Bytes from ``16GB`` (10^9), ``16GiB`` (2^30) or an int. A text without unit is refused."""
    return _quantity(
        f"{amount}B" if isinstance(amount, int) else amount,
        _BYTE_UNITS,
        MOST_BYTES,
        "is no amount of memory with a unit",
        "write for example 16GB (10^9 bytes each) or 16GiB (2^30 bytes each).",
    )


def parse_tokens(amount: Amount) -> int:
    """Tokens from ``8192``, ``32k`` (1024 each), ``1m`` or an int."""
    return _quantity(
        str(amount),
        {"": 1, "k": 1024, "m": 1024**2},
        MOST_TOKENS,
        "is no number of tokens",
        "write for example 8192 or 32k (k is 1024).",
    )


def _quantity(text: str, units: Mapping[str, int], most: int, wrong: str, hint: str) -> int:
    """A whole number from 1 to ``most``; a fraction of a unit is cut to whole ones."""
    short = text.strip()
    match = _QUANTITY.fullmatch(short) if len(short) <= 2 * _LONGEST else None
    if match is None or match[2].lower() not in units or len(match[1]) > _LONGEST:
        raise KvtuneError(f"{_shown(text)} {wrong}", hint=hint)
    number = int(Decimal(match[1]) * units[match[2].lower()])
    if not 1 <= number <= most:
        side = "less than one" if number < 1 else f"more than {most:,}"
        raise KvtuneError(f"{_shown(text)} {wrong} ({side})", hint=hint)
    return number


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def format_bytes(count: float) -> str:
    """Binary units, the ones that device memory is counted in: ``14.96 GiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def exact_bytes(count: int) -> str:
    """A size as it can be typed, without loss: ``16GB``, ``16GiB``, or bytes."""
    for unit, name in ((GB, "GB"), (GIB, "GiB")):
        if count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count}B"


def format_tokens(count: float) -> str:
    """``52 812 tokens``, with thin groups of three so that long counts can be read."""
    return f"{int(count):,}".replace(",", " ") + " tokens"


def format_seconds(seconds: float) -> str:
    """``7.0 us``, ``9.7 ms``, ``2.31 s``; ``0 s`` for none."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def parse_seconds(text: str) -> float:
    """Seconds from ``1s``, ``50ms`` or ``200us``. A bare number is refused: it has no unit."""
    match = _QUANTITY.fullmatch(text)
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    if match is None or match[2].lower() not in scale or float(match[1]) <= 0:
        raise KvtuneError(
            f"{text!r} is no time with a unit", hint="write for example 1s, 50ms or 200us."
        )
    return float(match[1]) * scale[match[2].lower()]
