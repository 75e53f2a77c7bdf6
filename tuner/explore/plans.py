"""Plans in columns, and how a line of ``plans.jsonl`` is written and read.

One JSON object a line, appended as trials finish: a reader in another process takes up where it
was. Heads are 16-bit option numbers in base64, a kilobyte or less a plan.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.bounds import Count, Loss, Parameter, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate, Tier
from kvtune.common.stored import checked

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
AGAIN = "run the same search again; it writes this file anew."
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Plan:
    """One trial's answer.

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
class _Line:
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


def read_line(record: Any, size: Size, where: str) -> Plan:
    """The plan of a parsed line.

    Args:
        record: parsed JSON.
        size: of the study.
        where: file and line.

    Raises:
        KvtuneError: it lacks something, does not fit the study, or a loss is outside its interval.
    """
    line = checked(_Line, record, where, AGAIN)
    codes = _codes(line.heads, where)
    fits = len(codes) == size.heads and len(line.by_kind) == size.kinds
    if not fits or codes.max(initial=0) >= size.options:
        raise KvtuneError("does not fit the study's first line", where=where, hint=AGAIN)
    for value, low, high in (line.kl, line.held_out):
        if not low * (1 - _ROUNDING) <= value <= high * (1 + _ROUNDING):
            raise KvtuneError("a loss lies outside its own interval", where=where, hint=AGAIN)
    return Plan(
        trial=line.trial,
        context_tokens=line.context_tokens,
        sequences=line.sequences,
        prompt_bytes=line.prompt_bytes,
        kl=_loss(line.kl, size.tier),
        held_out=_loss(line.held_out, size.tier),
        by_kind=line.by_kind,
        heads=codes,
        parameters=line.parameters,
    )


def _codes(text: str, where: str) -> NDArray[np.uint16]:
    try:
        data = base64.b64decode(text, validate=True)
        return np.frombuffer(data, "<u2").astype(np.uint16)
    except ValueError as error:
        raise KvtuneError("'heads' is no base64 of numbers", where=where, hint=AGAIN) from error


def columns(plans: Sequence[Plan], size: Size) -> Plans:
    """Plans side by side."""
    count = len(plans)

    def whole(name: str) -> Integers:
        return np.array([getattr(plan, name) for plan in plans], np.int64)

    def losses(name: str) -> Floats:
        found = (getattr(plan, name) for plan in plans)
        rows = [(each.value, each.low, each.high) for each in found]
        return np.array(rows, np.float64).reshape(count, 3)

    return Plans(
        trial=whole("trial"),
        context_tokens=whole("context_tokens"),
        sequences=whole("sequences"),
        prompt_bytes=whole("prompt_bytes"),
        kl=losses("kl"),
        held_out=losses("held_out"),
        by_kind=np.array([plan.by_kind for plan in plans], np.float64).reshape(count, size.kinds),
        heads=np.array([plan.heads for plan in plans], np.uint16).reshape(count, size.heads),
        parameters=tuple(plan.parameters for plan in plans),
        tier=size.tier,
    )
