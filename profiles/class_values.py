"""Numbers of a transformers configuration, whatever their names."""

from __future__ import annotations

from typing import Any


def first_of(config: Any, names: tuple[str, ...], missing: int = 0) -> int:
    """The first of these attributes that holds a number; the largest of a list."""
    for name in names:
        value = _value(config, name)
        if isinstance(value, (list, tuple)) and value:
            value = max(v for v in value if isinstance(v, int))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return missing


def _value(config: Any, name: str) -> Any:
    """An attribute; of one that differs by layer the first layer's."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises an error of its own, which is no AttributeError
        return getattr(config.per_layer_config[0], name, None)
