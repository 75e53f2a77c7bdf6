"""Requests from a file: JSON lines or CSV, checked line by line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.common.errors import KvtuneError, nearest
from kvtune.simulator.serving.requests import Requests
from kvtune.simulator.serving.sequence import Prefix

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL = ("prefix_ids", "prefix_tokens")
_HINT = (
    "every line has arrival_s, prompt_tokens and output_tokens, and may have prefix_ids with "
    "prefix_tokens (docs/serve-sim.md)."
)

Row = tuple[float, int, int, Prefix | None]


def read_requests(path: Path) -> Requests:
    """Read requests; they may stand in any order and are sorted by arrival.

    Args:
        path: ``.jsonl`` with an object a line, or ``.csv`` with a header; in CSV the ids of a
            prefix are separated by spaces.

    Raises:
        KvtuneError: no such file, another suffix, or a line with a missing or wrong value.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines}
    if path.suffix not in readers:
        raise KvtuneError("is neither .jsonl nor .csv", where=str(path), hint=_HINT)
    if not path.is_file():
        raise KvtuneError("there is no such file", where=str(path))
    try:
        rows = [_row(fields, f"{path}:{line}") for line, fields in readers[path.suffix](path)]
    except UnicodeDecodeError as error:
        raise KvtuneError("is not text in UTF-8", where=str(path)) from error
    if not rows:
        raise KvtuneError("holds no request", where=str(path), hint=_HINT)
    rows.sort(key=lambda row: row[0])
    arrival, prompt, output, prefixes = zip(*rows, strict=True)
    return Requests(
        np.array(arrival, np.float64),
        np.array(prompt, np.int64),
        np.array(output, np.int64),
        prefixes if any(prefixes) else (),
        f"{len(rows)} requests of {path.name}",
    )


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise KvtuneError("is not JSON", where=f"{path}:{number}", hint=_HINT) from error
            if not isinstance(fields, dict):
                raise KvtuneError("is no JSON object", where=f"{path}:{number}", hint=_HINT)
            yield number, fields


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for fields in reader:
                if None in fields or None in fields.values():
                    raise KvtuneError(
                        "has another number of fields than the header",
                        where=f"{path}:{reader.line_num}",
                    )
                yield reader.line_num, {key: text for key, text in fields.items() if text != ""}
        except csv.Error as error:
            raise KvtuneError(f"is not CSV: {error}", where=f"{path}:{reader.line_num}") from error


def _row(fields: Mapping[str, Any], where: str) -> Row:
    for name in fields:
        if name not in REQUIRED + OPTIONAL:
            hint = nearest(str(name), REQUIRED + OPTIONAL)
            raise KvtuneError(f"unknown field {name!r}", where=where, hint=hint)
    for name in REQUIRED:
        if name not in fields:
            raise KvtuneError(f"{name} is missing", where=where, hint=_HINT)
    prompt = _tokens(fields, "prompt_tokens", where)
    prefix = _prefix(fields, prompt, where)
    return _arrival(fields, where), prompt, _tokens(fields, "output_tokens", where), prefix


def _arrival(fields: Mapping[str, Any], where: str) -> float:
    value = _number(fields["arrival_s"])
    if value is None or value < 0:
        raise KvtuneError(
            f"arrival_s is {fields['arrival_s']!r}, not a number of seconds from 0 on", where=where
        )
    return value


def _tokens(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = _number(fields[name])
    if value is None or value < 1 or value != int(value) or value > 2**40:
        raise KvtuneError(
            f"{name} is {fields[name]!r}, not a whole number of at least 1", where=where
        )
    return int(value)


def _number(value: object) -> float | None:
    """A finite number, also from the text of a CSV field; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _prefix(fields: Mapping[str, Any], prompt_tokens: int, where: str) -> Prefix | None:
    given = [name for name in OPTIONAL if name in fields]
    if not given:
        return None
    if len(given) < len(OPTIONAL):
        raise KvtuneError("prefix_ids and prefix_tokens come together", where=where, hint=_HINT)
    ids = fields["prefix_ids"]
    names = tuple(map(str, ids.split() if isinstance(ids, str) else _as_list(ids, where)))
    tokens = _tokens(fields, "prefix_tokens", where)
    if tokens > prompt_tokens:
        raise KvtuneError(
            f"prefix_tokens is {tokens}, more than the {prompt_tokens} of the prompt", where=where
        )
    return Prefix(names, tokens) if names else None


def _as_list(ids: Any, where: str) -> list[Any]:
    if not isinstance(ids, list) or not all(isinstance(i, (int, str)) for i in ids):
        raise KvtuneError("prefix_ids is no list of numbers or names", where=where, hint=_HINT)
    return ids
