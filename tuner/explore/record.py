"""Writes ``plans.jsonl`` while a search runs, so that others can look at it meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.common.files import append_text, write_text
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.plans import Plan, write_line

if TYPE_CHECKING:
    from kvtune.simulator.quality.tables import Tables
    from kvtune.tuner.candidate import Candidate
    from kvtune.tuner.sources import QualitySource


class Recorder:
    """Appends one line a plan; the first writes the file anew.

    A search that finds no plan leaves what an earlier one of the same folder wrote.

    Args:
        folder: the run directory.
        facts: the first line.
        source: of the quality.
    """

    def __init__(self, folder: Path, facts: Facts, source: QualitySource) -> None:
        self.path, self.facts, self.source = folder / PLANS_FILE, facts, source
        self.begun = False

    def add(self, candidate: Candidate) -> None:
        """Write one plan."""
        plan = Plan(
            trial=candidate.number,
            context_tokens=candidate.context,
            sequences=candidate.sequences,
            prompt_bytes=candidate.prompt_bytes,
            kl=self.source.loss_of(candidate.choice, selection_split(self.source.tables)),
            held_out=self.source.loss_of(candidate.choice),
            by_kind=self._by_kind(candidate.choice),
            heads=candidate.choice.astype(np.uint16),
            parameters=candidate.parameters,
        )
        if not self.begun:
            write_text(self.path, json.dumps(self.facts.as_plain()) + "\n")
            self.begun = True
        append_text(self.path, write_line(plan))

    def _by_kind(self, choice: NDArray[np.int64]) -> tuple[float, ...]:
        means = self.source.by_kind(choice)
        return tuple(means[kind] for kind in self.facts.kinds)


def selection_split(tables: Tables) -> str:
    """The split that plans are judged on: selection, where there is one."""
    return "select" if any(s.split == "select" for s in tables.samples) else "search"
