"""What a few policies were off by live, carried over to others that err alike: a Gaussian process.

Policies are alike as far as the probes' responses to them point the same way, and as far as they
evict and lose as much. What they are off by on all kinds of text together is carried over whole,
and of what is a kind's own n / (n + ``KIND_TEXTS``) with n texts of it, as a search carries levels
of tuned plans: the rest is those texts' alone. Without that the process learns the texts that it
sees by heart, and more runs rank other texts worse.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from ranking_shapes import Texts
from torch import Tensor

from kvtune.simulator.quality.levels import KIND_TEXTS

Array = NDArray[np.float64]
ALIKE = 0.3
"""One minus the cosine at which policies are little alike."""
AMPLITUDE, EVICTING, SLOPE = 1.0, 0.5, 0.1
"""Variances of logarithms: of what like policies share, of what evicting adds, by the squared
logarithm of a loss."""
NOISE = 0.3
"""Spread of a policy's own, and of its texts'."""


def cosines(texts: Texts) -> Array:
    """How much responses to two policies point the same way, the mean over texts, ``[B, B]``."""
    found = []
    for _, each in texts.records.values():
        row = each.responses.float().sum(1).flatten(1)
        row = row / row.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found.append((row @ row.T).double().cpu().numpy())
    return np.asarray(np.mean(found, 0))


def kernel(said: Array, evicting: Array, alike: Array) -> Array:
    """Covariance of what policies are off by, ``[B, B]``.

    Args:
        said: logarithms of what is predicted, ``[B]``.
        evicting: share of the heads that evict, ``[B]``.
        alike: cosines, ``[B, B]``.
    """
    size, evicts = said - said.mean(), evicting - evicting.mean()
    rising = SLOPE * np.outer(size, size) + EVICTING * np.outer(evicts, evicts)
    return np.asarray(1 + rising + AMPLITUDE * np.exp(-(1 - alike) / ALIKE))


def carried(off: Array, covariance: Array, rows: NDArray[np.int64]) -> Array:
    """What all policies are off by, ``[B]``, of what the few in ``rows`` are, ``[n]``."""
    seen = covariance[np.ix_(rows, rows)] + NOISE**2 * np.eye(len(rows))
    return np.asarray(covariance[:, rows] @ np.linalg.solve(seen, off))


def moves(seen: Texts, said: dict[str, Tensor], rows: Tensor, alike: Array) -> dict[str, Array]:
    """By how much predictions move on each kind of text, ``[B]`` logarithms.

    Args:
        seen: texts on which some policies ran.
        said: what was predicted there, by kind of text, ``[B]`` nats/token.
        rows: the policies that ran.
        alike: cosines, ``[B, B]``.
    """
    few = rows.numpy()
    before = {kind: _log(losses) for kind, losses in said.items()}
    evicting = seen.groups.double().mean(1).numpy()
    covariance = kernel(np.asarray(np.mean(list(before.values()), 0)), evicting, alike)
    off = {kind: (_log(seen.live(kind)) - before[kind])[few] for kind in before}
    middle = np.asarray(np.mean(list(off.values()), 0))
    common = carried(middle, covariance, few)
    found = {}
    for kind in off:
        texts = len(seen.of(kind))
        own = carried(off[kind] - middle, covariance, few)
        found[kind] = common + texts / (texts + KIND_TEXTS) * own
    return found


def moved(said: dict[str, Tensor], by: dict[str, Array]) -> dict[str, Tensor]:
    """Predictions after such moves, ``[B]`` nats/token by kind of text."""
    return {kind: losses * torch.from_numpy(np.exp(by[kind])) for kind, losses in said.items()}


def _log(losses: Tensor) -> Array:
    return np.asarray(losses.double().clamp(min=1e-9).log().numpy())


def apart(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """Policies evenly over what is predicted, of every sort: a design that has seen no live run."""
    sort = groups.float().mean(1)
    order = sorted(range(len(losses)), key=lambda i: (round(float(sort[i])), float(losses[i])))
    at = np.linspace(0, len(order) - 1, count).round().astype(int)
    return torch.tensor(sorted({order[i] for i in at}))
