"""Runs every check of the suite on one method, format or allocator, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvtune.common.errors import KvtuneError, nearest
from kvtune.policies.allocator import allocators
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.format import formats
from kvtune.policies.method import methods
from kvtune.policies.testing.allocators import ALLOCATOR_CHECKS
from kvtune.policies.testing.cases import variants
from kvtune.policies.testing.decode import DECODE_CASES, DECODE_CHECKS
from kvtune.policies.testing.formats import FORMAT_CHECKS
from kvtune.policies.testing.methods import LONG, METHOD_CASES, METHOD_CHECKS


@dataclass(frozen=True)
class Verdict:
    """One check of one thing.

    Args:
        what: the thing, with its parameters.
        check: the check's name.
        reason: why it failed; empty where it passed.
    """

    what: str
    check: str
    reason: str = ""

    def __str__(self) -> str:
        """``ok`` or ``FAILED``, the check in words, and why."""
        words = self.check.replace("_", " ")
        return f"FAILED  {self.what}: {words}: {self.reason}" if self.reason else f"ok      {words}"


def judge(name: str) -> Iterator[Verdict]:
    """Every check on every variant of what is called ``name``.

    Raises:
        KvtuneError: nothing is called so.
    """
    if name in methods():
        yield from _judge_method(methods()[name])
    elif name in formats():
        roles = [("keys",), ("values",)]
        yield from _all(list(variants(formats()[name])), FORMAT_CHECKS, roles)
    elif name in allocators():
        cases = [(case,) for case in METHOD_CASES]
        yield from _all(list(variants(allocators()[name])), ALLOCATOR_CHECKS, cases)
    else:
        known = [*methods(), *formats(), *allocators()]
        raise KvtuneError(f"{name!r} is no method, format or allocator", hint=nearest(name, known))


def _judge_method(kind: type[Any]) -> Iterator[Verdict]:
    cases = [(case,) for case in (*METHOD_CASES, LONG)]
    yield from _all(list(variants(kind)), METHOD_CHECKS, cases)
    if issubclass(kind, DecodeMethod):
        yield from _all(list(variants(kind)), DECODE_CHECKS, [(case,) for case in DECODE_CASES])


def _all(
    things: list[Any], checks: tuple[Callable[..., None], ...], cases: list[tuple[Any, ...]]
) -> Iterator[Verdict]:
    """One verdict a check: the first failure, or that none was found."""
    for check in checks:
        yield _first_failure(things, check, cases)


def _first_failure(
    things: list[Any], check: Callable[..., None], cases: list[tuple[Any, ...]]
) -> Verdict:
    for thing in things:
        for case in cases:
            try:
                check(thing, *case)
            except Exception as error:  # a wrong method may fail in any way
                told = str(error).strip().split("\n")[0] or type(error).__name__
                where = f" at {', '.join(map(str, case))}" if case else ""
                return Verdict(repr(thing), check.__name__, told + where)
    return Verdict(things[0].name, check.__name__)
