"""Writes ``plans.jsonl`` while a search runs, so that others can look at it meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate
from kvtune.common.files import append_text, write_text
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.plans import Plan, write_line
from kvtune.tuner.quality import estimate

if TYPE_CHECKING:
    from kvtune.simulator.calibration import Calibration
    from kvtune.simulator.tables import Tables
    from kvtune.tuner.question import Candidate


class Recorder:
    """Appends one line a plan; a search that is taken up again writes the file anew.

    Args:
        folder: the run directory.
        facts: the first line.
        tables: every split, to judge plans by kind of text.
        calibration: from predicted to live.
    """

    def __init__(
        self, folder: Path, facts: Facts, tables: Tables, calibration: Calibration
    ) -> None:
        self.path, self.facts, self.calibration = folder / PLANS_FILE, facts, calibration
        self.selection = tables.of_split(selection_split(tables))
        self.held_out = tables.of_split("evaluate")
        write_text(self.path, json.dumps(facts.as_plain()) + "\n")

    def add(self, candidate: Candidate) -> None:
        """Write one plan; its loss as the study predicted it, before calibration."""
        held_out = self.held_out.by_sample(candidate.choice)
        plan = Plan(
            trial=candidate.number,
            context_tokens=candidate.context,
            sequences=candidate.sequences,
            prompt_bytes=candidate.prompt_bytes,
            kl=self._loss(self.selection, self.selection.by_sample(candidate.choice)),
            held_out=self._loss(self.held_out, held_out),
            by_kind=self._by_kind(held_out),
            heads=candidate.choice.astype(np.uint16),
            parameters=candidate.parameters,
        )
        append_text(self.path, write_line(plan))

    def _loss(self, tables: Tables, by_sample: NDArray[np.float32]) -> Estimate:
        return self.calibration.apply(estimate(by_sample, _kinds(tables), "table"))

    def _by_kind(self, by_sample: NDArray[np.float32]) -> tuple[float, ...]:
        means = by_kind(by_sample, _kinds(self.held_out), self.calibration.value)
        return tuple(means[kind] for kind in self.facts.kinds)


def _kinds(tables: Tables) -> list[str]:
    return [sample.kind for sample in tables.samples]


def selection_split(tables: Tables) -> str:
    """The split that plans are judged on: selection, where there is one."""
    return "select" if any(s.split == "select" for s in tables.samples) else "search"


def by_kind(
    losses: NDArray[np.floating] | Sequence[float],
    kinds: Sequence[str],
    moved: Callable[[float], float] = float,
) -> dict[str, float]:
    """Means by kind of text, each through ``moved`` (a calibration)."""
    array, labels = np.asarray(losses, float), np.asarray(kinds)
    return {kind: moved(float(array[labels == kind].mean())) for kind in sorted(set(kinds))}
