"""Reading a ``config.json`` of unknown origin: plain JSON, bounded in size, depth and numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError

MOST_BYTES = 8 * 2**20
MOST_DEPTH = 32
MOST_NUMBER = 2**31  # longest context and widest table that anyone could mean
# Keys whose numbers are built one by one; no published model has a quarter of these.
_MOST = (
    (re.compile(r"(num_|n_)?(hidden_|decoder_|encoder_)?(layers?|blocks)|.*_layers|depth"), 1024),
    (re.compile(r".*experts?(_per_tok|_per_token)?|n_routed_experts"), 8192),
    (re.compile(r"(hidden|intermediate|ffn_hidden|.*intermediate)_size|.*_dim|d_model"), 2**20),
    (re.compile(r".*heads?(_kv)?"), 2**14),
    (re.compile(r"vocab_size|padded_vocab_size"), 2**24),
)


def read_config(path: Path | str) -> tuple[dict[str, Any], Path]:
    """The content of a ``config.json``, or of the one in a folder, and its path.

    Raises:
        KvtuneError: no such file, no JSON object, or a number that no model has.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    raw = _parse(_text(file), file)
    if not isinstance(raw, dict):
        raise KvtuneError("a model's configuration is a JSON object", where=str(file))
    check_numbers(raw, str(file))
    return raw, file


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise KvtuneError("this is too large for a model's configuration", where=str(file))
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise KvtuneError(
            f"cannot read it: {error.strerror}", where=str(file), hint="a config.json is wanted."
        ) from error
    except UnicodeDecodeError as error:
        raise KvtuneError("this is no text in UTF-8", where=str(file)) from error


def _parse(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise KvtuneError("this JSON is nested too deeply", where=str(file)) from error
    except ValueError as error:
        raise KvtuneError(f"this is no valid JSON: {str(error)[:80]}", where=str(file)) from error


def check_numbers(value: Any, file: str, key: str = "", depth: int = 0) -> None:
    """Refuse nesting and numbers that no model has, with the key that holds them.

    Raises:
        KvtuneError: nested too deeply, not finite, or above the bound of its key.
    """
    if depth > MOST_DEPTH:
        raise KvtuneError("this JSON is nested too deeply", where=file)
    if isinstance(value, Mapping):
        for name, entry in value.items():
            check_numbers(entry, file, str(name), depth + 1)
    elif isinstance(value, list):
        if len(value) > 2**17:
            raise KvtuneError(f"{key!r} has {len(value):,} entries", where=file)
        for entry in value:
            check_numbers(entry, file, key, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise KvtuneError(f"{key!r} must be a finite number", where=file)
    elif isinstance(value, int):
        _check_count(value, file, key)


def _check_count(value: int, file: str, key: str) -> None:
    most = next((most for names, most in _MOST if names.fullmatch(key)), MOST_NUMBER)
    if key in _LENGTHS:
        most = 2**62  # some files write 1e30 for "no limit"; what it means is decided elsewhere
    if abs(value) > most:
        shown = f"{value:,}" if abs(value) < 10**15 else "a number of more than 15 digits"
        raise KvtuneError(f"{key!r} must be at most {most:,}, not {shown}", where=file)


_LENGTHS = ("model_max_length", "max_seq_len")
