"""How many processors there are to share out."""

from __future__ import annotations

import os


def processors() -> int:
    """Those that this process may use; all of the machine where the system does not say which."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1
