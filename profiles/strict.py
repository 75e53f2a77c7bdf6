"""Strict YAML: every value keeps its line, unknown, missing and doubled keys are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, NoReturn

import yaml

from kvtune.common.errors import KvtuneError, nearest

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Located:
    """A YAML value with its place: ``value`` is a dict or list of ``Located``, or a scalar.

    Args:
        value: the content.
        file: name shown in errors.
        line: line of the value, counted from 1.
        path: the keys that lead to it, joined by dots.
    """

    value: Any
    file: str
    line: int
    path: str

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        """Raise the one error that names file, line and key."""
        key = f"{self.path!r} " if self.path else ""
        raise KvtuneError(f"{key}{message}", where=f"{self.file}:{self.line}", hint=hint)

    def mapping(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Located]:
        """The entries, once every key is known and none that is required is missing."""
        if not isinstance(self.value, dict):
            self.fail("must be a mapping of keys to values")
        needed = list(required)
        known = {*needed, *optional}
        for key, entry in self.value.items():
            if key not in known:
                entry.fail("is no known key. " + nearest(key, known))
        for key in needed:
            if key not in self.value:
                self.fail(f"lacks the key {key!r}" if self.path else f"the key {key!r} is missing")
        return dict(self.value)

    def entries(self) -> Iterator[tuple[str, Located]]:
        """Every key with its value, for tables whose keys are names."""
        if not isinstance(self.value, dict):
            self.fail("must be a mapping of names to records")
        yield from self.value.items()

    def text(self, choices: Iterable[str] = ()) -> str:
        """A text that is not empty; one of ``choices`` where they are given."""
        if not isinstance(self.value, str) or not self.value:
            self.fail(f"must be a text, not {self.value!r}")
        allowed = list(choices)
        if allowed and self.value not in allowed:
            self.fail(f"is {self.value!r}; it must be one of {', '.join(allowed)}")
        return self.value

    def texts(self) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(self.value, list):
            self.fail("must be a list of texts")
        return tuple(item.text() for item in self.value)

    def flag(self) -> bool:
        """``true`` or ``false``."""
        if not isinstance(self.value, bool):
            self.fail(f"must be true or false, not {self.value!r}")
        return self.value

    def count(self, minimum: int = 1) -> int:
        """A whole number of at least ``minimum``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.fail(f"must be a whole number, not {self.value!r}")
        if self.value < minimum:
            self.fail(f"must be at least {minimum}, not {self.value}")
        return self.value

    def positive(self) -> float:
        """A finite number above zero."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail(f"must be a number, not {self.value!r}")
        if not 0 < self.value < float("inf"):
            self.fail(f"must be above zero, not {self.value}")
        return float(self.value)


def parse(text: str, file: str) -> Located:
    """The document as a tree of located values.

    Raises:
        KvtuneError: the text is no YAML, is empty, or a key stands twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise KvtuneError("the file is empty", where=file)
        return _located(loader, node, file, "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = file if mark is None else f"{file}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise KvtuneError(f"this is no valid YAML: {problem}", where=where) from error
    finally:
        loader.dispose()


def _located(loader: Any, node: yaml.Node, file: str, path: str) -> Located:
    """``node`` and all below it; aliases and tags beyond plain values are not followed."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return Located(_entries(loader, node, file, path), file, line, path)
    if isinstance(node, yaml.SequenceNode):
        items = [_located(loader, item, file, f"{path}[{i}]") for i, item in enumerate(node.value)]
        return Located(items, file, line, path)
    return Located(loader.construct_object(node), file, line, path)


def _entries(loader: Any, node: yaml.MappingNode, file: str, path: str) -> dict[str, Located]:
    found: dict[str, Located] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        below = f"{path}.{key}" if path else key
        value = _located(loader, value_node, file, below)
        if key in found:
            Located(None, file, key_node.start_mark.line + 1, below).fail("stands here twice")
        found[key] = value
    return found


def library(folder: str) -> Iterator[tuple[str, Located]]:
    """Stem and content of every YAML file shipped in ``profiles/<folder>``, by name."""
    files = (resources.files("kvtune.profiles") / folder).iterdir()
    for file in sorted(files, key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            text = file.read_text(encoding="utf-8")
            yield file.name[: -len(".yaml")], parse(text, f"profiles/{folder}/{file.name}")
