"""What live runs of one policy found, sample by sample, and its summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtune.policies.policy import Policy
from kvtune.runtime.live import LiveRun
from kvtune.traces.samples import Sample
from kvtune.tuner.quality import bootstrap, mean_over_kinds


@dataclass
class Outcome:
    """Live figures of one policy, sample by sample."""

    kl: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    digits: list[float] = field(default_factory=list)
    needles: list[float] = field(default_factory=list)
    full_digits: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def add(self, sample: Sample, run: LiveRun, full_bytes: int) -> None:
        self.kl.append(float(run.kl.mean()))
        self.kinds.append(sample.kind)
        self.share.append(run.footprint_bytes / full_bytes)
        asked = np.array(sample.answer_mask)
        if asked.any():
            self.digits.append(float(run.correct[asked].mean()))
            self.full_digits.append(float(run.full_correct[asked].mean()))
            needle = np.array(sample.needle_of_row)
            whole = [run.correct[needle == n].all() for n in range(sample.needles)]
            self.needles.append(float(np.mean(whole)))

    @property
    def points(self) -> np.ndarray:
        """Digits right below the full cache's, of every needle sample, in percent."""
        return 100 * (np.array(self.full_digits) - np.array(self.digits))

    @property
    def mean_kl(self) -> float:
        return mean_over_kinds(self.kl, self.kinds)

    def summary(self) -> dict[str, Any]:
        low, high = np.percentile(bootstrap(self.kl, self.kinds), [2.5, 97.5])
        found = {
            "kl": self.mean_kl,
            "kl_interval": [float(low), float(high)],
            "share": float(np.mean(self.share)),
            "kl_by_kind": {
                kind: float(
                    np.mean([x for x, k in zip(self.kl, self.kinds, strict=True) if k == kind])
                )
                for kind in sorted(set(self.kinds))
            },
        }
        if self.digits:
            found["digits"] = float(np.mean(self.digits))
            found["full_digits"] = float(np.mean(self.full_digits))
            found["whole_needles"] = float(np.mean(self.needles))
            found["needles_asked"] = 8 * len(self.needles)
        return found


def points_below_full(outcome: Outcome) -> dict[str, Any]:
    """Digits below the full cache's, paired with it, with a 95 % interval."""
    interval = np.percentile(bootstrap(outcome.points, outcome.kinds), [2.5, 97.5])
    return {
        "points_below_full": float(outcome.points.mean()),
        "points_interval": [float(x) for x in interval],
    }


def times_as_much(theirs: Outcome, ours: Outcome) -> tuple[float, list[float]]:
    """How many times our loss theirs is, and its interval; the same samples are drawn for both."""
    ratio = bootstrap(theirs.kl, theirs.kinds) / bootstrap(ours.kl, ours.kinds)
    return theirs.mean_kl / ours.mean_kl, [float(x) for x in np.percentile(ratio, [2.5, 97.5])]


def used(policy: Policy) -> dict[str, int]:
    """How many heads a plan gives each option."""
    labels = [option.label for option in policy.options()]
    return {label: labels.count(label) for label in sorted(set(labels))}
