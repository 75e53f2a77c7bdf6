"""Finds methods, formats, allocators and exporters by name, in a folder and in other packages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import GenericAlias, MappingProxyType
from typing import Any, TypeGuard, TypeVar

from kvtune.common.errors import KvtuneError, nearest

T = TypeVar("T")


@cache
def registered(package: str, base: type[T]) -> MappingProxyType[str, type[T]]:
    """Classes below ``base`` that have a ``name``, by that name.

    They come from the modules of ``package`` and from other distributions, which name them under
    the entry point of the folder: ``kvtune.methods`` for ``kvtune.policies.methods``.

    Raises:
        ValueError: two classes of the folder claim one name.
        KvtuneError: another distribution's class cannot be loaded, is none of ``base``, or claims a
            name that is taken.
    """
    found: dict[str, type[T]] = {}
    for kind in _in_folder(package, base):
        name = kind.__dict__["name"]
        if found.setdefault(name, kind) is not kind:
            raise ValueError(f"{kind} and {found[name]} are both called {name!r}")
    for entry in entry_points(group=group_of(package)):
        kind = _loaded(entry, base)
        name = kind.__dict__["name"]
        if found.setdefault(name, kind) is not kind:
            raise _broken(entry, f"has the name {name!r}, which {found[name].__module__} has too")
    return MappingProxyType(found)


def group_of(package: str) -> str:
    """The entry point under which other distributions add to a folder: ``kvtune.methods``."""
    return "kvtune." + package.rsplit(".", 1)[-1]


def _in_folder(package: str, base: type[T]) -> Iterator[type[T]]:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        imported = importlib.import_module(f"{package}.{module.name}")
        for _, kind in inspect.getmembers(imported, _is_class):
            if issubclass(kind, base) and isinstance(kind.__dict__.get("name"), str):
                yield kind


def _is_class(thing: object) -> TypeGuard[type[Any]]:
    """Whether it can be asked for its bases; Python 3.10 calls ``list[int]`` a class too."""
    return inspect.isclass(thing) and not isinstance(thing, GenericAlias)


def _loaded(entry: EntryPoint, base: type[T]) -> type[T]:
    try:
        kind = entry.load()
    except Exception as error:  # somebody else's code may raise anything while it is imported
        raise _broken(entry, f"cannot be imported: {error}") from error
    if not (_is_class(kind) and issubclass(kind, base)):
        raise _broken(entry, f"is no {base.__name__}")
    if not isinstance(kind.__dict__.get("name"), str):
        raise _broken(entry, "has no name")
    return kind


def _broken(entry: EntryPoint, what: str) -> KvtuneError:
    owner = f" of the package {entry.dist.name}" if entry.dist else ""
    return KvtuneError(
        f"the entry point {entry.group}: {entry.name} = {entry.value}{owner} {what}",
        hint="uninstall that package, or mend its entry point.",
    )


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
