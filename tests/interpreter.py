"""Triton's interpreter, in which kernels are tested without a GPU, made quicker."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def quicken() -> None:
    """Let the interpreter look only once for what it patches.

    It patches ``triton.language`` at every launch and at every call of a device function, and reads
    all members of its modules each time: 40 % of what a kernel takes here.
    """
    from triton.runtime import interpreter

    interpreter._patch_builtin = _patch_builtin


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    from triton.language.core import is_builtin

    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As Triton's, of the members found at first; all of them are patched at once, or none."""
    from triton.runtime.interpreter import _patch_attr

    for name, member in _builtins(package):
        if getattr(package, name) is not member:
            return
        _patch_attr(package, name, member, builder, scope)
