"""Mutations of valid inputs: bytes, tokens and JSON values, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
import re
from typing import Any

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "x", "../../etc/passwd", "\ud800", "\u0000",
    [], {}, [[]], [1, 2], {"a": 1}, "1", "nan", "int4", "h2o",
)  # fmt: skip
_TOKENS = (
    b"0", b"-1", b"1e999", b"nan", b"inf", b"9" * 30, b"9" * 5000, b".5", b"-.5", b"1_000", b"0x10",
    b"null", b"~", b"[]", b"{}", b"!!float ", b"!!timestamp ", b"&a ", b"*a ", b"<<: ", b"\x00",
    b"\xff\xfe", b"\n", b"\r\n", b"\t", b",", b":", b'"', b"\xe2\x80\xa8", b"18446744073709551616",
)  # fmt: skip


def mutated(seed: bytes, rng: random.Random, structured: bool) -> bytes:
    """One to three mutations of ``seed``."""
    data = seed
    for _ in range(rng.choice((1, 1, 2, 3))):
        if structured and rng.random() < 0.6:
            data = _swapped(data, rng)
        else:
            data = rng.choice(_BYTES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 40) :]


def _again(data: bytes, rng: random.Random) -> bytes:
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    to = min(to, at + 400)
    return data[:to] + data[at:to] * rng.choice((1, 1, 2, 30)) + data[to:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_TOKENS) + data[at:]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data[:20_000]))
    if not found:
        return _insert(data, rng)
    one = rng.choice(found)
    return data[: one.start()] + rng.choice(_TOKENS) + data[one.end() :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    at, depth = rng.randrange(len(data) + 1), rng.choice((20, 200, 5000, 100_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"k":', b"}"), (b"- ", b"")))
    return data[:at] + opened * depth + b"1" + closed * depth + data[at:]


def _random(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(200))


_BYTES = (_flip, _flip, _cut, _drop, _again, _insert, _number, _number, _nest, _random)


def _swapped(data: bytes, rng: random.Random) -> bytes:
    """One line's JSON with a value swapped, removed, added or doubled; bytes where it is none."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at]) if len(lines) < 40 and lines[at] else json.loads(data)
        whole = not (len(lines) < 40 and lines[at])
    except (ValueError, RecursionError):
        return _number(data, rng)
    text = json.dumps(_odd(value, rng)).encode()
    if rng.random() < 0.1:  # a key twice
        text = re.sub(rb'("\w+": )', rb"\1 0, \1", text, count=1)
    if whole:
        return text
    lines[at] = text
    return b"\n".join(lines)


def _odd(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(_ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    draw = rng.random()
    if draw < 0.1:
        del value[key]
    elif draw < 0.2 and isinstance(value, dict):
        value[rng.choice(("x", "format", "__class__"))] = rng.choice(_ODD)
    elif draw < 0.25 and isinstance(value, list):
        value.append(rng.choice(value))
    else:
        value[key] = _odd(value[key], rng)
    return value
