"""A stand-in's loss as a band: what another model may lose with the same option for all heads.

One number would claim more than is known: the source is another model, which read other texts.
The band reaches from the kind of text that loses least on the source to the kind that loses most,
and is widened by what was seen between models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtune.common.estimate import BAND, Estimate
from kvtune.simulator.quality.calibration import Calibration
from kvtune.tuner.quality import mean_over_kinds

SAMPLES = (10, 90)  # percentiles over a kind's samples
LESS, MORE = 1.5, 4.3
"""How far below and above its source another model may lie.

Set on Gemma-3-270M, which was no source, with one of twelve options in all of its layers and
prompts of 420 tokens: the live loss was at least 1.06 times the lower end before it is widened (all
tokens in 4 bits), and at most 3.7 times the upper one (H2O, a quarter of the tokens). One KV head a
layer, prompts a quarter as long as the source's and few samples make this a hard case. On other
samples (``benchmarks/results/stand-in-gemma-3-270m.json``) 11 of the 12 lie inside; H2O with half
of the tokens lost 1.3 times the widened end.
"""

MORE_BY_FAMILY = {"kvzip": 9.0}
"""How far above its source a published rule may lie, where that is further.

Seen on Gemma-3-270M at five shares of the bytes and prompts of 384 tokens
(``benchmarks/results/stand-in-families-gemma-3-270m-h200.json``): KVzip loses up to 8.9 times its
source's upper end, on prompts a fifth as long; all 25 cells of five families lie inside.
"""


def band(
    losses: ArrayLike, kinds: Sequence[str], calibration: Calibration, *, evicts: bool
) -> Estimate:
    """The band of one policy, around the source's own calibrated mean.

    It holds both what the source's calibration says and what its tables said before.

    Args:
        losses: of the source's samples, before calibration, nats/token.
        kinds: of text, one a sample.
        calibration: from predicted to live, of the source.
        evicts: whether the policy keeps less than all tokens.
    """
    before, after = np.asarray(losses, float), calibration.applied(losses, kinds, evicts)
    mean = mean_over_kinds(after, kinds)
    ends = (*_ends(np.stack([before, after]), kinds), mean, mean_over_kinds(before, kinds))
    return _widened(mean, ends)


def band_by_kind(
    losses: ArrayLike, kinds: Sequence[str], calibration: Calibration, *, evicts: bool
) -> dict[str, Estimate]:
    """The band of each kind of text alone."""
    array, labels = np.asarray(losses, float), np.asarray(kinds)
    parts = {kind: array[labels == kind] for kind in sorted(set(kinds))}
    return {
        kind: band(part, [kind] * len(part), calibration, evicts=evicts)
        for kind, part in parts.items()
    }


def _ends(losses: NDArray[np.float64], kinds: Sequence[str]) -> tuple[float, float]:
    """The loss on the kind that loses least and on the one that loses most, of rows ``[., n]``."""
    labels = np.asarray(kinds)
    parts = [np.percentile(losses[:, labels == kind], SAMPLES, axis=1) for kind in set(kinds)]
    return float(min(part[0].min() for part in parts)), float(max(part[1].max() for part in parts))


def band_of_live(
    kl: float, interval: Sequence[float], by_kind: Mapping[str, float], family: str = "uniform"
) -> Estimate:
    """The band of a policy that ran live on the source: its interval and its kinds of text."""
    return _widened(kl, (kl, *interval, *by_kind.values()), MORE_BY_FAMILY.get(family, MORE))


def _widened(value: float, ends: Sequence[float], more: float = MORE) -> Estimate:
    return Estimate(value, min(ends) / LESS, max(ends) * more, "nats/token", BAND)
