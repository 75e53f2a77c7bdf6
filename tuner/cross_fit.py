"""What the best of many plans loses on texts that it was not chosen on.

A plan that is the best of many on some samples looks better there than it is: part of why it won is
luck. Cross-fitting leaves out one sample at a time, chooses on the others, and reads the loss of
what was chosen on the one left out; the mean over all samples is free of that luck. It is that of a
choice from one sample fewer, and so a little high rather than low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvtune.tuner.candidate import Candidate, front
from kvtune.tuner.explore.record import selection_split
from kvtune.tuner.quality import estimate, widened
from kvtune.tuner.sources import QualitySource


def cross_fitted_front(source: QualitySource, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The front, each point with the loss of the best of those that serve as many tokens.

    What a point had to beat to be on the front are the candidates with the same weights that serve
    as many tokens at once or more.
    """
    split = selection_split(source.tables)
    kinds = [sample.kind for sample in source.tables.of_split(split).samples]
    losses = _by_sample(source, candidates, split)
    freed = np.array([candidate.freed_bytes for candidate in candidates])
    tokens = np.array([candidate.tokens_at_once for candidate in candidates])

    def with_loss(point: Candidate) -> Candidate:
        beaten = (freed == point.freed_bytes) & (tokens >= point.tokens_at_once)
        unseen, evicts = left_out(losses[beaten], kinds), source.evicts(point.choice)
        found = estimate(unseen, kinds, "table")
        found = widened(found, source.calibration, unseen, kinds, evicts=evicts)
        return replace(point, unseen=found)

    return [with_loss(point) for point in front(candidates)]


def left_out(losses: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
    """Loss on every sample of what is best on all others, ``[n]``.

    Args:
        losses: of candidates on samples, ``[C, n]``.
        kinds: of text, which count alike, n of them.
    """
    count = len(kinds)
    if count < 2:
        alone: NDArray[np.float64] = losses[losses.mean(1).argmin()]
        return alone
    best = (losses @ _weights_without(kinds)).argmin(0)
    found: NDArray[np.float64] = losses[best, np.arange(count)]
    return found


def _weights_without(kinds: Sequence[str]) -> NDArray[np.float64]:
    """Weights of all samples in a mean over kinds, one sample left out by column, ``[n, n]``."""
    alike = np.equal.outer(np.array(kinds), np.array(kinds)).astype(float)
    kept = 1 - np.eye(len(kinds))
    each = kept / np.maximum(alike @ kept, 1)
    weights: NDArray[np.float64] = each / each.sum(0)
    return weights


def _by_sample(
    source: QualitySource, candidates: Sequence[Candidate], split: str
) -> NDArray[np.float64]:
    """Calibrated losses of candidates on the samples of a split, ``[C, n]``."""
    known: dict[bytes, NDArray[np.float64]] = {}
    for candidate in candidates:
        key = candidate.choice.tobytes()
        if key not in known:
            known[key] = source.expected(candidate.choice, split)[0]
    return np.array([known[candidate.choice.tobytes()] for candidate in candidates])
