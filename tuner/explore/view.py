"""What a screen shows of a study: two figures, a filter, a front, and where the cursor may go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvtune.common.units import MIB
from kvtune.tuner.explore.axes import AXES, BYTES, EVERYTHING, LOSS, TOKENS, Axis, Filter, front
from kvtune.tuner.explore.dimensions import DIMENSIONS, Dimension
from kvtune.tuner.explore.plans import Floats
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.what_if import Figures, Setting
from kvtune.tuner.result import Baseline

Rows = NDArray[np.int64]
Side = Literal["x", "y"]


@dataclass(frozen=True)
class Line:
    """A limit or a landmark, across the plot at one value of one axis."""

    axis: Axis
    value: float
    words: str


@dataclass(frozen=True)
class View:
    """A study seen in two figures.

    Args:
        study: the snapshot.
        figures: memory and time of its plans at ``setting``.
        setting: where they run.
        x: figure across.
        y: figure upward.
        filter: which plans are shown.
        colour: what tells them apart beside the figures, if anything.
    """

    study: Study
    figures: Figures
    setting: Setting
    x: Axis = TOKENS
    y: Axis = LOSS
    filter: Filter = EVERYTHING
    colour: Dimension | None = None

    def with_axis(self, side: Side, axis: Axis) -> View:
        """Another figure on a side; one that the other side shows changes places with it."""
        x, y = (axis, self.y) if side == "x" else (self.x, axis)
        return replace(self, x=self.y, y=self.x) if x is y else replace(self, x=x, y=y)

    def with_next_axis(self, side: Side) -> View:
        """The next figure on a side, of those that the other does not show."""
        here, other = (self.x, self.y) if side == "x" else (self.y, self.x)
        free = [axis for axis in AXES if axis is not other]
        return self.with_axis(side, free[(free.index(here) + 1) % len(free)])

    def with_next_colour(self) -> View:
        """Plans told apart by the next of their properties, or by none."""
        known = (None, *DIMENSIONS)
        return replace(self, colour=known[(known.index(self.colour) + 1) % len(known)])

    @property
    def is_what_if(self) -> bool:
        """Whether memory and time are of another setting than the search was for."""
        return self.setting != Setting.asked(self.study.facts)

    @cached_property
    def rows(self) -> Rows:
        """Plans that the filter lets through."""
        return self.filter.rows(self.study, self.figures)

    @cached_property
    def groups(self) -> dict[str, Rows]:
        """Shown plans by their value of ``colour``, the most frequent first."""
        if self.colour is None:
            return {}
        values = np.array(self.colour.values(self.study))[self.rows]
        names, counts = np.unique(values, return_counts=True)
        order = names[np.argsort(-counts, kind="stable")]
        return {str(name): self.rows[values == name] for name in order}

    @cached_property
    def across(self) -> Floats:
        """The figure across, value, low, high of all plans, ``[n, 3]``."""
        return self.x.column(self.study, self.figures)

    @cached_property
    def upward(self) -> Floats:
        """The other figure, likewise."""
        return self.y.column(self.study, self.figures)

    @cached_property
    def front(self) -> Rows:
        """Shown plans that no other shown plan beats in both figures, in reading order."""
        x, y = self.across[self.rows, 0], self.upward[self.rows, 0]
        found = self.rows[front(x, y, self.x, self.y)]
        return found[np.argsort(self.across[found, 0], kind="stable")]

    @cached_property
    def start(self) -> int | None:
        """Where the cursor begins: the chosen plan, if it is shown."""
        if not len(self.rows):
            return None
        chosen = self.study.chosen
        return chosen if chosen in self.rows else int(self.front[0])

    def step(self, row: int, by: int) -> int:
        """The front's plan so many places right of ``row``, or the nearest one to it."""
        if not len(self.front):
            return row
        place = np.searchsorted(self.across[self.front, 0], self.across[row, 0])
        if row in self.front:
            place = int(np.flatnonzero(self.front == row)[0]) + by
        elif by < 0:
            place = int(place) - 1
        return int(self.front[np.clip(place, 0, len(self.front) - 1)])

    def nearest(self, distance: Floats) -> int:
        """The shown plan at the least of the distances, ``[len(rows)]``."""
        return int(self.rows[int(distance.argmin())])

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Limits and landmarks on the axes that are shown."""
        facts, contexts = self.study.facts, self.figures.budgets
        found = [Line(LOSS, facts.largest_kl, f"KL {facts.largest_kl:g} accepted")]
        if len(contexts) == 1:
            (((_, context), budget),) = contexts.items()
            full = int(budget.most(None).value) * context
            uncompressed = facts.shape.kv_bytes(context) / MIB
            found.append(Line(BYTES, uncompressed, f"{uncompressed:.0f} MiB uncompressed"))
            if full:
                found.append(Line(TOKENS, full, f"{full:,} tokens uncompressed".replace(",", " ")))
        return tuple(line for line in found if line.axis in (self.x, self.y))

    def baselines(self) -> Iterable[tuple[Baseline, float, float]]:
        """Baselines that have both figures, with them."""
        outcome, chosen = self.study.outcome, self.study.chosen
        if outcome is None or chosen is None:
            return
        for baseline in outcome.baselines[1:]:
            if (x := self._of(baseline, self.x)) is None:
                continue
            if (y := self._of(baseline, self.y)) is not None:
                yield baseline, x, y

    def _of(self, baseline: Baseline, axis: Axis) -> float | None:
        """A baseline's figure, as far as its loss and bytes tell it."""
        chosen = self.study.chosen
        if axis is LOSS:
            return baseline.best.value
        if axis not in (BYTES, TOKENS) or chosen is None:
            return None
        context = int(self.figures.context_tokens[chosen])
        full = self.study.facts.shape.kv_bytes(context)
        prompt = full * self.share(baseline)
        if axis is BYTES:
            return prompt / MIB
        facts = self.study.facts
        held = prompt + facts.shape.kv_bytes_per_token() * facts.generated_tokens
        return float(self.figures.budget(chosen).count(held) * context)

    def share(self, baseline: Baseline) -> float:
        """A baseline's bytes over bf16's: those of the plan it stands beside, nearly."""
        outcome, chosen = self.study.outcome, self.study.chosen
        if outcome is None or chosen is None:
            return 1.0
        ratio = baseline.prompt_bytes / max(outcome.baselines[0].prompt_bytes, 1)
        return float(self.figures.share[chosen]) * ratio
