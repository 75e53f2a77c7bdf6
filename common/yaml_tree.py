"""YAML as a tree whose every value knows its line; built from events, so nothing is executed.

Scalars follow YAML 1.2: ``on``, ``010`` and ``1:30`` are texts. An alias shares the tree it names,
so a file's tree is never larger than the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import yaml

from kvtune.common.errors import KvtuneError

LARGEST_FILE = 2**20
DEEPEST = 16
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_NO_BREAKS = float("inf") if _DUMPER is yaml.SafeDumper else -1  # as each spells it
_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    "": None, "~": None, "null": None, "true": True, "false": False,
    ".inf": float("inf"), "-.inf": -float("inf"), ".nan": float("nan"),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A value and its place.

    Args:
        value: a dict of nodes by key, a list of nodes, or None, bool, int, float, str.
        line: counted from 1.
        path: the keys that lead to it, for messages; empty at the root.
    """

    value: Any
    line: int
    path: str

    def plain(self) -> Any:
        """Dicts, lists and scalars without their places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def size(self) -> int:
        """Scalars below it, aliases written out; the tree itself may share them."""
        return _size(self, {})


Events: TypeAlias = Iterator[Any]


def parse(text: str, file: str) -> Node:
    """The one document of ``text``.

    Raises:
        KvtuneError: no YAML, empty, several documents, too large or too deep, a doubled key, a
            tag, or an alias of nothing.
    """
    if len(text) > LARGEST_FILE:
        raise KvtuneError(f"a file has at most {LARGEST_FILE} characters", where=file)
    try:
        return _Builder(yaml.parse(text, Loader=_LOADER), file).document()
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = file if mark is None else f"{file}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise KvtuneError(f"this is no valid YAML: {problem}", where=where) from error


def flow(value: Any) -> str:
    """One line of YAML that ``parse``, and readers of YAML 1.1, read back equal."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=_NO_BREAKS, sort_keys=False,
        allow_unicode=True,
    )  # fmt: skip
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(_DUMPER):  # type: ignore[misc]
    """Quotes the texts that only YAML 1.2 takes for numbers, such as 1e5."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


class _Builder:
    """Turns events into nodes."""

    def __init__(self, events: Events, file: str) -> None:
        self.events = events
        self.file = file
        self.anchors: dict[str, Node] = {}

    def document(self) -> Node:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise KvtuneError("the file is empty", where=self.file)
        root = self.node(next(self.events), "", 0)
        next(self.events)  # document end
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self.fail(event, "a second document starts here; a policy file holds one")
        return root

    def node(self, event: Any, path: str, depth: int) -> Node:
        if depth > DEEPEST:
            self.fail(event, f"nested more than {DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.fail(event, f"the alias *{event.anchor} names nothing that stands before it")
            shared = self.anchors[event.anchor]
            return Node(shared.value, _line(event), path)
        if event.tag not in (None, "!"):
            self.fail(event, f"tags such as {event.tag} are not allowed")
        built = Node(self.content(event, path, depth), _line(event), path)
        if event.anchor is not None:
            self.anchors[event.anchor] = built
        return built

    def content(self, event: Any, path: str, depth: int) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path, depth)
        return _scalar(event.value) if event.implicit[0] else event.value

    def mapping(self, path: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self.fail(event, "a key must be a single word")
            if event.value in entries:
                self.fail(event, f"the key {event.value!r} stands here twice")
            below = f"{path}.{event.value}" if path else event.value
            entries[event.value] = self.node(next(self.events), below, depth + 1)
        return entries

    def sequence(self, path: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, f"{path}[{len(items)}]", depth + 1))
        return items

    def fail(self, event: Any, message: str) -> NoReturn:
        raise KvtuneError(message, where=f"{self.file}:{_line(event)}")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _size(node: Node, sizes: dict[int, int]) -> int:
    if not isinstance(node.value, (dict, list)):
        return 1
    key = id(node.value)
    if key not in sizes:
        below = node.value.values() if isinstance(node.value, dict) else node.value
        sizes[key] = 1 + sum(_size(child, sizes) for child in below)
    return sizes[key]
