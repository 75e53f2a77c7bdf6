"""One file a kind of op; each lists what it measures in ``OPERATIONS``."""

from __future__ import annotations

import importlib
import pkgutil

from kvtune.common.errors import KvtuneError
from kvtune.runtime.measure.operation import Operation


def all_operations() -> tuple[Operation, ...]:
    """Every op of every file in this folder.

    Raises:
        KvtuneError: two ops could make the same points.
    """
    found: list[Operation] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").OPERATIONS
    if not found:
        raise KvtuneError("there is nothing to measure")
    return tuple(found)
