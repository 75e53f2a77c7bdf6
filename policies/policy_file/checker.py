"""Typed reading of a YAML tree that collects every problem instead of stopping at the first."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from unicodedata import category

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.yaml_tree import Node

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One mistake: its line, what is wrong, what to do."""

    line: int
    message: str
    hint: str | None = None


class PolicyFileError(KvtuneError):
    """All mistakes of a file: the first as its message, the others line by line below its hint."""

    def __init__(self, file: str, problems: Collection[Problem]) -> None:
        """Name the file and its mistakes, one at least."""
        self.problems = sorted(problems, key=lambda problem: problem.line)
        first, rest = self.problems[0], self.problems[1:]
        hint = "\n".join([*filter(None, [first.hint]), *_others(rest)])
        super().__init__(first.message, hint=hint or None, where=f"{file}:{first.line}")


_SHOWN = 8  # mistakes beside the first; more of them are rarely independent


def _others(problems: Sequence[Problem]) -> Iterator[str]:
    """What else is wrong, a line each."""
    if problems:
        yield f"{len(problems)} more problem{'s' * (len(problems) > 1)}:"
    for problem in problems[:_SHOWN]:
        yield f"  line {problem.line}: {problem.message}"
    if len(problems) > _SHOWN:
        yield f"  and {len(problems) - _SHOWN} below those"


class Checker:
    """Reads values; a value that is wrong becomes None and a problem."""

    def __init__(self) -> None:
        """Start without problems."""
        self.problems: list[Problem] = []

    def problem(self, node: Node, message: str, hint: str | None = None) -> None:
        """Note a mistake."""
        at = f"{node.path}: " if node.path else ""
        self.problems.append(Problem(node.line, at + message, hint))

    def mapping(
        self,
        node: Node,
        known: Iterable[str] | None = None,
        required: Iterable[str] = (),
        hint: str | None = None,
    ) -> dict[str, Node]:
        """The entries whose keys are known; unknown and missing keys are problems.

        Args:
            node: the mapping.
            known: keys; any, unless given.
            required: those that must be there.
            hint: what to do where one of these is missing.
        """
        if not isinstance(node.value, dict):
            self.problem(node, f"must be a mapping of keys to values, not {_show(node)}")
            return {}
        entries: dict[str, Node] = dict(node.value)
        if missing := [key for key in required if key not in entries]:
            self.problem(node, _missing(missing), hint)
        if known is not None:
            names = list(known)
            for key in [key for key in entries if key not in names]:
                entry, close = entries.pop(key), nearest(key, names) if names else None
                self.problem(Node(None, entry.line, node.path), f"{key!r} is no key here", close)
        return entries

    def sequence(self, node: Node) -> list[Node]:
        """The items of a list."""
        if not isinstance(node.value, list):
            self.problem(node, f"must be a list, not {_show(node)}")
            return []
        return list(node.value)

    def value(
        self, node: Node, hint: Any, low: float | None = None, high: float | None = None
    ) -> Any:
        """A value of the annotated type within bounds; None if it is not."""
        try:
            value = _admit(node.value, hint)
        except TypeError:
            self.problem(node, f"must be {_words(hint)}, not {_show(node)}")
            return None
        if isinstance(value, str) and any(category(letter)[0] == "C" for letter in value):
            self.problem(node, f"holds characters that cannot be shown: {_show(node)}")
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if low is not None and value < low:
                self.problem(node, f"must be at least {_bound(low)}, not {value}")
            if high is not None and value > high:
                self.problem(node, f"must be at most {_bound(high)}, not {value}")
        return value

    def name(self, node: Node, known: Collection[str], what: str) -> str | None:
        """A text that names something known."""
        if not isinstance(node.value, str):
            self.problem(node, f"must be the name of a {what}, not {_show(node)}")
        elif node.value not in known:
            hint = nearest(node.value, known) if known else None
            self.problem(node, f"unknown {what} {node.value!r}", hint)
        else:
            return node.value
        return None

    def component(self, node: Node, kinds: Mapping[str, type[T]], what: str) -> T | None:
        """A method, format or allocator: its name, or a mapping of ``name`` and parameters."""
        given: dict[str, Node] = {}
        naming: Node | None = node
        if isinstance(node.value, dict):
            given = self.mapping(node, required=["name"])
            naming = given.pop("name", None)
        name = self.name(naming, kinds, what) if naming else None
        return self._build(node, kinds[name], given, f"{what} {name!r}") if name else None

    def _build(self, node: Node, kind: type[T], given: dict[str, Node], what: str) -> T | None:
        parameters: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
        hints, values, before = _type_hints(cast(Hashable, kind)), {}, len(self.problems)
        for key, entry in given.items():
            if key not in parameters:
                hint = nearest(key, parameters) if parameters else f"the {what} has no parameters."
                self.problem(
                    Node(None, entry.line, node.path), f"{key!r} is no key of {what}", hint
                )
                continue
            bounds = parameters[key].metadata
            values[key] = self.value(entry, hints[key], bounds.get("low"), bounds.get("high"))
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except KvtuneError as error:
            self.problem(node, error.message, error.hint)
            return None


def _missing(keys: Sequence[str]) -> str:
    """``the keys 'layers' and 'kv_heads' are missing``."""
    *others, last = map(repr, keys)
    if not others:
        return f"the key {last} is missing"
    return f"the keys {', '.join(others)} and {last} are missing"


def _show(node: Node) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(node.value)) or f"{node.value!r}"[:60]


def _bound(number: float) -> str:
    """A bound in full where it is whole, as it may be typed back."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _admit(value: Any, hint: Any) -> Any:
    """``value`` as the annotated type; whole numbers may stand for floats, nothing else changes.

    Raises:
        TypeError: it is of another type.
    """
    if isinstance(value, (dict, list)):
        raise TypeError
    for choice in _choices(hint):
        if get_origin(choice) is Literal and isinstance(value, str) and value in get_args(choice):
            return value
        if choice is type(value) and not (choice is float and not math.isfinite(value)):
            return value
        if choice is float and type(value) is int:
            return float(value)
    raise TypeError


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    parts = [
        " or ".join(map(str, get_args(choice)))
        if get_origin(choice) is Literal
        else names.get(choice, "nothing")
        for choice in _choices(hint)
    ]
    return " or ".join(parts)


@functools.cache
def _type_hints(owner: Hashable) -> dict[str, Any]:
    """Its fields' types; reading them anew for every option of a file takes most of the time."""
    return get_type_hints(owner)
