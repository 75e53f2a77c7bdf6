"""Reading of stored files: bytes, JSON and schemas, each checked once, where the file is opened.

Code behind these functions can rely on what it gets: JSON has no doubled keys, no NaN, no huge
numbers and no deep nesting, and a value that passed a schema has the schema's types and bounds.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

LARGEST_FILE = 2**28
DEEPEST = 24
_MOST_DIGITS = 18
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

T = TypeVar("T")


def read_bytes(path: Path, hint: str | None = None, most: int = LARGEST_FILE) -> bytes:
    """A file's content.

    Raises:
        KvtuneError: it cannot be read, or has more than ``most`` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise KvtuneError(
            f"cannot be read: {error.strerror}", where=str(path), hint=hint
        ) from error
    if len(data) > most:
        raise KvtuneError(f"has more than {most:,} bytes", where=str(path), hint=hint)
    return data


def require_file(path: Path, hint: str | None = None) -> None:
    """Refuse a path that leads to no file, before what reads it is imported.

    Raises:
        KvtuneError: there is no such file.
    """
    if not path.is_file():
        raise KvtuneError("no such file", where=str(path), hint=hint)


def read_text(path: Path, hint: str | None = None, most: int = LARGEST_FILE) -> str:
    """A file's text.

    Raises:
        KvtuneError: likewise, or it is not UTF-8.
    """
    return decoded(read_bytes(path, hint, most), str(path), hint)


def decoded(data: bytes, where: str, hint: str | None = None) -> str:
    """UTF-8 bytes as text, line ends as they are.

    Raises:
        KvtuneError: they are not UTF-8; with the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise KvtuneError("is not UTF-8", where=f"{where}:{line}", hint=hint) from error


def read_json(path: Path, hint: str | None = None) -> Any:
    """The value of a JSON file; raises as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path, hint), str(path), hint)


def parse_json(text: str | bytes, where: str, hint: str | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: one value.
        where: file, or file:line, for messages.
        hint: what to do about a damaged text.

    Raises:
        KvtuneError: no JSON, a key twice in one object, NaN or infinity, a number of more than 18
            digits, half a surrogate pair, or nesting deeper than 24.
    """
    if isinstance(text, bytes):
        text = decoded(text, where, hint)
    if (most := _depth(text)) > DEEPEST:
        raise KvtuneError(f"nests deeper than {DEEPEST} levels ({most})", where=where, hint=hint)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if error.lineno > 1 else where
        reason = f"{error.msg.removesuffix(' at').lower()}, column {error.colno}"
        raise KvtuneError(f"is no JSON ({reason})", where=place, hint=hint) from error
    except UnicodeEncodeError as error:
        raise KvtuneError("holds half a surrogate pair", where=where, hint=hint) from error
    except ValueError as error:
        raise KvtuneError(str(error), where=where, hint=hint) from error
    return value


def _depth(text: str) -> int:
    """The deepest nesting of arrays and objects."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif found[0] in "]}":
            depth -= 1
    return deepest


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled[:40]!r} stands twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"{digits[:24]}... has more than {_MOST_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:24]} is no finite number")
    return number


def checked(schema: type[T], value: Any, where: str, hint: str | None = None) -> T:
    """A parsed JSON value as ``schema`` describes it: a dataclass, or any type with bounds.

    Types are strict (no text for a number) and unknown keys are refused.

    Raises:
        KvtuneError: the first thing that is not as the schema says, with its keys.
    """
    from pydantic import ValidationError

    read = _adapter(cast(Hashable, schema)).validate_json
    try:
        return cast(T, read(json.dumps(value), strict=True, extra="forbid"))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{place[:200]!r}: {reason}" if place else reason
        raise KvtuneError(message, where=where, hint=hint) from error
    except KvtuneError as error:
        raise KvtuneError(error.message, where=where, hint=hint or error.hint) from error


@functools.cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, schema))


def whole_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines that were written to their end, without it, and what stands after the last.

    A process that was killed, or a disk that was full, leaves half a line at a file's end; files
    that are appended to line by line are read without it.
    """
    end = data.rfind(b"\n") + 1
    return data[:end].split(b"\n")[:-1], data[end:]


def read_lines(path: Path, hint: str | None = None) -> Iterator[tuple[str, Any]]:
    """Place (``file:line``) and value of every whole line of a JSONL file.

    Raises:
        KvtuneError: as ``read_bytes`` and ``parse_json`` do.
    """
    for number, line in enumerate(whole_lines(read_bytes(path, hint))[0], start=1):
        where = f"{path}:{number}"
        yield where, parse_json(line, where, hint)
