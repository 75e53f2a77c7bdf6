"""Plans in columns, and how a line of ``plans.jsonl`` is written and read.

One JSON object a line, appended as trials finish: a reader in another process takes up where it
was. Heads are 16-bit option numbers in base64, a kilobyte or less a plan.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from kvtune.common.bounds import Count, Loss, Parameter, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.common.stored import checked, parse_json

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
AGAIN = "run the same search again; it writes this file anew."
_ROUNDING = 1e-6
_MISFIT = "does not fit the study's first line"


@dataclass(frozen=True)
class Plan:
    """The plan that one trial of a study answered with.

    Args:
        trial: number.
        context_tokens: prompt tokens of a sequence.
        sequences: at once.
        prompt_bytes: of one compressed prompt.
        kl: on the selection samples, nats/token.
        held_out: on samples that no choice was made on.
        by_kind: the held-out loss by kind of text.
        heads: option numbers, ``[I]``.
        parameters: what the study chose.
    """

    trial: int
    context_tokens: int
    sequences: int
    prompt_bytes: int
    kl: Estimate
    held_out: Estimate
    by_kind: tuple[float, ...]
    heads: NDArray[np.uint16]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Plans:
    """Many plans, in columns; n of them, of I heads, with K kinds of text.

    Args:
        trial: numbers, ``[n]``.
        context_tokens: ``[n]``.
        sequences: ``[n]``.
        prompt_bytes: ``[n]``.
        kl: value, low, high, ``[n, 3]`` nats/token.
        held_out: likewise.
        by_kind: ``[n, K]``.
        heads: ``[n, I]``.
        parameters: n of them.
        tier: of the losses.
    """

    trial: Integers
    context_tokens: Integers
    sequences: Integers
    prompt_bytes: Integers
    kl: Floats
    held_out: Floats
    by_kind: Floats
    heads: NDArray[np.uint16]
    parameters: tuple[dict[str, Any], ...]
    tier: Tier = "table"

    def __len__(self) -> int:
        return len(self.trial)

    def __getitem__(self, row: int) -> Plan:
        return Plan(
            trial=int(self.trial[row]),
            context_tokens=int(self.context_tokens[row]),
            sequences=int(self.sequences[row]),
            prompt_bytes=int(self.prompt_bytes[row]),
            kl=_loss(self.kl[row], self.tier),
            held_out=_loss(self.held_out[row], self.tier),
            by_kind=tuple(map(float, self.by_kind[row])),
            heads=self.heads[row],
            parameters=self.parameters[row],
        )

    def only(self, row: int) -> Plans:
        """One of these plans, by itself."""
        arrays: dict[str, Any] = {name: getattr(self, name)[row : row + 1] for name in ARRAYS}
        return Plans(**arrays, parameters=self.parameters[row : row + 1], tier=self.tier)

    def __add__(self, later: Plans) -> Plans:
        """These plans, and behind them those of the same study that finished later."""

        def joined(name: str) -> Any:
            return np.concatenate([getattr(self, name), getattr(later, name)])

        arrays = {name: joined(name) for name in ARRAYS}
        return Plans(**arrays, parameters=self.parameters + later.parameters, tier=self.tier)


ARRAYS = tuple(f.name for f in fields(Plans) if f.name not in ("parameters", "tier"))
"""Columns of plans that are arrays."""


def _loss(ends: Iterable[float], tier: Tier) -> Estimate:
    value, low, high = map(float, ends)
    return Estimate(value, low, high, "nats/token", tier)


def write_line(plan: Plan) -> str:
    """One line, with its newline."""
    plain = {
        "trial": plan.trial,
        "context_tokens": plan.context_tokens,
        "sequences": plan.sequences,
        "prompt_bytes": plan.prompt_bytes,
        "kl": [plan.kl.value, plan.kl.low, plan.kl.high],
        "held_out": [plan.held_out.value, plan.held_out.low, plan.held_out.high],
        "by_kind": list(plan.by_kind),
        "heads": base64.b64encode(plan.heads.astype("<u2").tobytes()).decode(),
        "parameters": plan.parameters,
    }
    return json.dumps(plain) + "\n"


@dataclass(frozen=True)
class Line:
    """The form of a plan's line; of its figures value, low and high."""

    trial: Whole
    context_tokens: Count
    sequences: Count
    prompt_bytes: Whole
    kl: tuple[Loss, Loss, Loss]
    held_out: tuple[Loss, Loss, Loss]
    by_kind: tuple[Loss, ...]
    heads: str
    parameters: dict[str, Parameter]


_LINE, _LINES, _KEYS = TypeAdapter(Line), TypeAdapter(list[Line]), len(fields(Line))


@dataclass(frozen=True)
class Size:
    """What all lines of a study have alike.

    Args:
        heads: KV heads of the model, I.
        options: that a head may be given.
        kinds: of held-out text, K.
        tier: of the losses.
    """

    heads: int
    options: int
    kinds: int
    tier: Tier = "table"


def read_lines(texts: Sequence[bytes], place: Callable[[int], str]) -> list[Line]:
    """The plans that lines of the file hold; together where nothing is odd, else one by one.

    Args:
        texts: JSON, without newlines.
        place: file and line of the one of a number.

    Raises:
        KvtuneError: as ``read_line`` says.
    """
    try:
        found = _LINES.validate_json(b"[%b]" % b",".join(texts), strict=True, extra="forbid")
    except ValidationError:
        found = []
    if len(found) == len(texts) and all(map(_is_plain, found, texts)):
        return found
    return [read_line(text, place(row)) for row, text in enumerate(texts)]


def read_line(text: bytes, where: str) -> Line:
    """The plan that a line of the file holds, its types and bounds checked.

    Args:
        text: JSON, without its newline.
        where: file and line.

    Raises:
        KvtuneError: no JSON, or something is missing, unknown or out of bounds.
    """
    return _plain_line(text) or checked(Line, parse_json(text, where, AGAIN), where, AGAIN)


def _plain_line(text: bytes) -> Line | None:
    """The same in an eighth of the time, for a line in which nothing is odd; else None."""
    try:
        line = _LINE.validate_json(text, strict=True, extra="forbid")
    except ValidationError:
        return None
    return line if _is_plain(line, text) else None


def _is_plain(line: Line, text: bytes) -> bool:
    """Whether a line has as many quotes as its plan's strings.

    A key that stands twice, an escaped quote or another line's text leaves others.
    """
    values = line.parameters.values()
    strings = _KEYS + 1 + len(values) + [*map(type, values)].count(str)
    return text.count(b'"') == 2 * strings


def columns(lines: Sequence[Line], size: Size, place: Callable[[int], str]) -> Plans:
    """Plans side by side.

    Args:
        lines: one a plan.
        size: of the study.
        place: file and line of the plan of a number, for messages.

    Raises:
        KvtuneError: a line does not fit the study, or a loss is outside its interval.
    """
    count = len(lines)
    codes = [_codes(line, size, place, row) for row, line in enumerate(lines)]

    def whole(name: str) -> Integers:
        return np.array([getattr(line, name) for line in lines], np.int64)

    def losses(name: str) -> Floats:
        rows = np.array([getattr(line, name) for line in lines], np.float64).reshape(count, 3)
        _refuse(~is_inside(rows), "a loss lies outside its own interval", place)
        return rows

    heads = np.frombuffer(b"".join(codes), "<u2").astype(np.uint16).reshape(count, size.heads)
    _refuse(heads.max(1, initial=0) >= size.options, _MISFIT, place)
    return Plans(
        trial=whole("trial"),
        context_tokens=whole("context_tokens"),
        sequences=whole("sequences"),
        prompt_bytes=whole("prompt_bytes"),
        kl=losses("kl"),
        held_out=losses("held_out"),
        by_kind=np.array([line.by_kind for line in lines], np.float64).reshape(count, size.kinds),
        heads=heads,
        parameters=tuple(line.parameters for line in lines),
        tier=size.tier,
    )


def is_inside(losses: Floats) -> NDArray[np.bool_]:
    """Which losses, value, low and high, ``[n, 3]``, lie in their own interval, ``[n]``."""
    value, low, high = losses.T
    found: NDArray[np.bool_] = (low * (1 - _ROUNDING) <= value) & (value <= high * (1 + _ROUNDING))
    return found


def _codes(line: Line, size: Size, place: Callable[[int], str], row: int) -> bytes:
    """The option numbers of a line's heads, two bytes each."""
    try:
        data = base64.b64decode(line.heads, validate=True)
    except ValueError as error:
        said = "'heads' is no base64 of numbers"
        raise KvtuneError(said, where=place(row), hint=AGAIN) from error
    if len(data) != 2 * size.heads or len(line.by_kind) != size.kinds:
        raise KvtuneError(_MISFIT, where=place(row), hint=AGAIN)
    return data


def _refuse(wrong: NDArray[np.bool_], message: str, place: Callable[[int], str]) -> None:
    """Raise for the first plan with which something is wrong."""
    if wrong.any():
        raise KvtuneError(message, where=place(int(wrong.argmax())), hint=AGAIN)
