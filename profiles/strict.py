"""Strict YAML: every value keeps its line, unknown, missing and doubled keys are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, NoReturn

from kvtune.common import yaml_tree
from kvtune.common.errors import KvtuneError, nearest

_LARGEST = 100_000  # scalars of one file
_LARGEST_NUMBER = 10**18


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

    def word(self) -> str:
        """A text or a number, as text: versions and dates are written as either."""
        if isinstance(self.value, bool) or not isinstance(self.value, (str, int, float)):
            self.fail(f"must be a text, not {self.value!r}")
        return str(self.value)

    def texts(self) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(self.value, list):
            self.fail("must be a list of texts")
        return tuple(item.text() for item in self.value)

    def numbers(self) -> tuple[float, ...]:
        """A list of finite numbers above zero."""
        if not isinstance(self.value, list):
            self.fail("must be a list of numbers")
        return tuple(item.positive() for item in self.value)

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
        if self.value > _LARGEST_NUMBER:
            self.fail(f"must be at most {_LARGEST_NUMBER:.0e}")
        return self.value

    def positive(self) -> float:
        """A finite number above zero."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail(f"must be a number, not {self.value!r}")
        if not 0 < self.value <= _LARGEST_NUMBER:
            self.fail(f"must be above zero and at most {_LARGEST_NUMBER:.0e}")
        return float(self.value)


def parse(text: str, file: str) -> Located:
    """The document as a tree of located values.

    Raises:
        KvtuneError: the text is no YAML, is empty, or a key stands twice.
    """
    tree = yaml_tree.parse(text, file)
    if tree.value is None:
        raise KvtuneError("the file is empty", where=file)
    if tree.size() > _LARGEST:
        raise KvtuneError(f"has more than {_LARGEST:,} values, aliases written out", where=file)
    return _located(tree, file)


def _located(node: yaml_tree.Node, file: str) -> Located:
    """``node`` and all below it, each with its file."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _located(entry, file) for key, entry in value.items()}
    elif isinstance(value, list):
        value = [_located(entry, file) for entry in value]
    return Located(value, file, node.line, node.path)


def library_file(folder: str, stem: str) -> Located | None:
    """Content of one YAML file shipped in ``profiles/<folder>``; None where there is no such."""
    file = resources.files("kvtune.profiles") / folder / f"{stem}.yaml"
    if not file.is_file():
        return None
    return parse(file.read_text(encoding="utf-8"), f"profiles/{folder}/{stem}.yaml")


def library(folder: str) -> Iterator[tuple[str, Located]]:
    """Stem and content of every YAML file shipped in ``profiles/<folder>``, by name."""
    files = (resources.files("kvtune.profiles") / folder).iterdir()
    for file in sorted(files, key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            text = file.read_text(encoding="utf-8")
            yield file.name[: -len(".yaml")], parse(text, f"profiles/{folder}/{file.name}")
