"""Which samples are traced, which plans are picked on, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtune.traces.samples import Sample, by_turns
from kvtune.traces.workloads import Workload, build

KINDS = ("prose", "code", "retrieval")


@dataclass(frozen=True)
class Division:
    """Samples by their use; a kind has its search, select and evaluate samples each.

    Args:
        workload: in words.
        plain: as many of every kind, in all three splits.
        select_needles: more needles for picking plans.
        needles: held-out ones, ``plain``'s among them.
    """

    workload: str
    plain: tuple[Sample, ...]
    select_needles: tuple[Sample, ...]
    needles: tuple[Sample, ...]

    def of(self, *splits: str) -> list[Sample]:
        """The plain samples of some splits, one of every kind and then another of every kind."""
        return by_turns([sample for sample in self.plain if sample.split in splits])


def divided(
    tokenizer: Any,
    per_kind: Sequence[int],
    *,
    select_needles: int = 16,
    needles: int = 64,
    tokens: int = 2048,
    observed: int = 256,
) -> Division:
    """Samples of prose, code and retrieval, ``per_kind`` (search, select, evaluate) of each."""
    search, select, evaluate = per_kind
    counts = {
        "search": dict.fromkeys(KINDS, search),
        "select": dict.fromkeys(KINDS, select) | {"retrieval": select + select_needles},
        "evaluate": dict.fromkeys(KINDS, evaluate) | {"retrieval": max(evaluate, needles)},
    }
    workload = Workload(counts, tokens=tokens, observed=observed)
    made = build(workload, tokenizer)

    def retrieval(split: str) -> tuple[Sample, ...]:
        return tuple(s for s in made if (s.split, s.kind) == (split, "retrieval"))

    extra, asked = retrieval("select")[select:], retrieval("evaluate")
    beyond = {*extra, *asked[evaluate:]}
    plain = tuple(sample for sample in made if sample not in beyond)
    return Division(workload.describe(), plain, extra, asked[:needles])
