"""A policy live on the real model; ``load_cache`` is what a user needs."""

from __future__ import annotations

from typing import Any

__all__ = ["load_cache"]


def __getattr__(name: str) -> Any:
    if name == "load_cache":
        from kvtune.runtime.cache.loading import load_cache

        return load_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
