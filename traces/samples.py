"""A sample: the tokens that a model reads, and what the observed part of them asks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from kvtune.common.bounds import Count, Name, Whole
from kvtune.common.errors import KvtuneError

Split = Literal["search", "select", "evaluate"]
Kind = Literal[
    "prose", "code", "retrieval", "recall", "chat", "copy", "user",
    "guide", "source", "json", "logs", "dialogue", "language",
    "single", "multikey", "tracking", "common", "frequent", "turns", "instruction", "leak",
]  # fmt: skip
SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Sample:
    """N tokens to run and the token after them; the last C of the N are observed.

    Row t of the observed part (0 <= t < C) is the model's output at position P + t, P = N - C, and
    predicts the token at position P + t + 1. ``next_token`` closes the last row.

    Args:
        id: unique within a trace.
        split: which use the sample is reserved for.
        kind: what the text is.
        token_ids: the tokens [N].
        next_token: the token after them, target of the last row.
        observed: C.
        needle_of_row: for each row, the needle whose answer digit its target is, or -1 [C].
    """

    id: Name
    split: Split
    kind: Kind
    token_ids: tuple[Whole, ...]
    next_token: Whole
    observed: Count
    needle_of_row: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not 0 < self.observed < len(self.token_ids):
            raise KvtuneError(
                f"sample {self.id}: {self.observed} observed of {len(self.token_ids)} tokens",
                hint="observe at least one token and leave at least one as the prompt.",
            )
        if len(self.needle_of_row) != self.observed:
            raise KvtuneError(f"sample {self.id}: needle_of_row must have one entry a row")

    @property
    def prompt(self) -> int:
        """P, the tokens before the observed part."""
        return len(self.token_ids) - self.observed

    @property
    def targets(self) -> tuple[int, ...]:
        """The token that each row predicts [C]."""
        return (*self.token_ids[self.prompt + 1 :], self.next_token)

    @property
    def answer_mask(self) -> tuple[bool, ...]:
        """Rows whose target is a digit of a needle's answer [C]."""
        return tuple(needle >= 0 for needle in self.needle_of_row)

    @property
    def needles(self) -> int:
        """How many needles the observed part asks for."""
        return len({needle for needle in self.needle_of_row if needle >= 0})


def by_turns(samples: Sequence[Sample]) -> list[Sample]:
    """One of every split and kind, then another of each: any first part of it is balanced."""
    seen = Counter[tuple[Split, Kind]]()
    turns = []
    for sample in samples:
        turns.append(seen[sample.split, sample.kind])
        seen[sample.split, sample.kind] += 1
    return [samples[at] for at in sorted(range(len(samples)), key=turns.__getitem__)]


def content_hash(samples: Iterable[Sample]) -> str:
    """sha256 over everything that the samples hold: equal hashes mean equal workloads."""
    digest = hashlib.sha256()
    for sample in samples:
        held = [getattr(sample, field.name) for field in fields(Sample)]
        digest.update(repr(held).encode())
    return digest.hexdigest()
