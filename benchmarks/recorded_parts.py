"""A benchmark's parts, one after another: a fault is recorded, and the next part goes on."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def say(*words: object) -> None:
    """Progress, on standard error."""
    print(*words, file=sys.stderr, flush=True)


def attempt(record: Callable[[str, Any], None], name: str, measure: Callable[[], Any]) -> None:
    """Record under ``name`` what a part finds, or in words how it failed."""
    begun = time.monotonic()
    try:
        found = measure()
    except Exception as error:
        found = f"failed: {type(error).__name__}: {error}"[:2000]
        traceback.print_exc()
    record(name, found)
    say(name, f"{time.monotonic() - begun:.0f} s")
