"""Plans in columns, and how a line of ``plans.jsonl`` is written and read.

One JSON object a line, appended as trials finish: a reader in another process takes up where it
was. Heads are 16-bit option numbers in base64, a kilobyte or less a plan.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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

    def __len__(self) -> int:
        return len(self.trial)

    def __getitem__(self, row: int) -> Plan:
        return Plan(
            trial=int(self.trial[row]),
            context_tokens=int(self.context_tokens[row]),
            sequences=int(self.sequences[row]),
            prompt_bytes=int(self.prompt_bytes[row]),
            kl=_loss(self.kl[row]),
            held_out=_loss(self.held_out[row]),
            by_kind=tuple(map(float, self.by_kind[row])),
            heads=self.heads[row],
            parameters=self.parameters[row],
        )


def _loss(ends: Floats) -> Estimate:
    value, low, high = map(float, ends)
    return Estimate(value, low, high, "nats/token", "table")


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


def columns(records: Sequence[dict[str, Any]], heads: int, kinds: int) -> Plans:
    """Parsed lines, side by side.

    Raises:
        KeyError, TypeError, ValueError: a line lacks something, or is of another size.
    """
    count = len(records)

    def whole(name: str) -> Integers:
        return np.array([r[name] for r in records], np.int64)

    def table(name: str, width: int) -> Floats:
        return np.array([r[name] for r in records], np.float64).reshape(count, width)

    codes = b"".join(base64.b64decode(r["heads"], validate=True) for r in records)
    return Plans(
        trial=whole("trial"),
        context_tokens=whole("context_tokens"),
        sequences=whole("sequences"),
        prompt_bytes=whole("prompt_bytes"),
        kl=table("kl", 3),
        held_out=table("held_out", 3),
        by_kind=table("by_kind", kinds),
        heads=np.frombuffer(codes, "<u2").astype(np.uint16).reshape(count, heads),
        parameters=tuple(dict(r["parameters"]) for r in records),
    )
