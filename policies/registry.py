"""Finds what a folder holds: every class with a ``name`` in a package's modules, by that name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import field
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

from kvtune.common.errors import KvtuneError, nearest

T = TypeVar("T")


@cache
def registered(package: str, base: type[T]) -> MappingProxyType[str, type[T]]:
    """Classes below ``base`` defined in the modules of ``package``, keyed by their ``name``.

    Raises:
        ValueError: two classes claim one name.
    """
    found: dict[str, type[T]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        for _, kind in inspect.getmembers(
            importlib.import_module(f"{package}.{module.name}"), inspect.isclass
        ):
            name = kind.__dict__.get("name")
            if not issubclass(kind, base) or not isinstance(name, str):
                continue
            if found.setdefault(name, kind) is not kind:
                raise ValueError(f"{kind} and {found[name]} are both called {name!r}")
    return MappingProxyType(found)


def find(package: str, base: type[T], name: str) -> type[T]:
    """The class called ``name``; an unknown name is refused with the nearest known ones."""
    kinds = registered(package, base)  # type: ignore[arg-type]
    if name not in kinds:
        what = package.rsplit(".", 1)[-1].rstrip("s")
        raise KvtuneError(f"unknown {what} {name!r}", hint=nearest(name, kinds))
    return kinds[name]


LONGEST_PROMPT = 2**24
"""Tokens: above any context that models are made for; bounds parameters that count tokens."""


def parameter(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that documents itself: YAML, ``kvtune policies`` and tests read it.

    Args:
        default: the published default.
        doc: one line on what it does.
        unit: for example ``tokens``.
        low: smallest value allowed.
        high: largest value allowed.
    """
    return field(default=default, metadata={"doc": doc, "unit": unit, "low": low, "high": high})
