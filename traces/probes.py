"""Probes: random directions of the logits whose second moment is what changing them costs.

The KL divergence from the full cache falls into two parts, exactly: whether the likeliest token
comes, and which of the others comes if it does not,

    KL = KL(Bernoulli p || Bernoulli sigmoid(m + c))  +  (1 - p) KL(others || changed others)

with p the likeliest token's probability, m = log(p / (1 - p)) its log-odds and c their change.
The second order of the first part is p (1 - p) c^2 / 2, which vanishes where the model is sure,
and that is where a lost fact does its harm: p falls from 0.997 to nothing, and no Fisher probe has
seen it. Here the curvature is the mean over changes of a given reach instead, so that sure tokens
count for what they would lose. A reach of 0 gives Fisher's curvature back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

REACH = 2.0
"""Standard deviation of the changes of log-odds that curvature is averaged over, in nats."""

_NODES = 32


@dataclass(frozen=True)
class Probes:
    """How a sample's probes are drawn.

    Args:
        count: S.
        seed: of the draws, each sample from its own stream.
        reach: see ``REACH``.
    """

    count: int
    seed: int = 0
    reach: float = REACH

    def draw(self, log_p: Tensor, sample_id: str) -> Drawn:
        """What the probes of one sample are made of.

        Args:
            log_p: the model's own predictions at the observed positions, ``[C, vocabulary]``.
            sample_id: names its stream.
        """
        import torch

        stream = hashlib.sha256(f"{self.seed}/{sample_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "big") >> 1)
        top = log_p.argmax(-1)
        if_not = log_p.scatter(1, top[:, None], -torch.inf)
        log_rest = if_not.logsumexp(-1)  # of 1 - p, exact where p rounds to 1
        others = if_not.softmax(-1)
        labels = torch.multinomial(others.cpu(), self.count, replacement=True, generator=generator)
        signs = 2.0 * torch.randint(2, labels.shape, generator=generator) - 1
        margin = log_p.gather(1, top[:, None])[:, 0] - log_rest
        weights = curvature(margin, self.reach).sqrt()
        return Drawn(
            top=top,
            others=others,
            rest=(log_rest / 2).exp(),
            labels=labels.T.to(log_p.device),
            margins=signs.T.to(log_p) * weights,
        )


@dataclass(frozen=True)
class Drawn:
    """One sample's draws; C observed positions, S probes.

    Args:
        top: the likeliest token, ``[C]``.
        others: probabilities of the tokens if it is not that one, ``[C, vocabulary]``.
        rest: square root of the probability that it is not, ``[C]``.
        labels: tokens drawn from the others, ``[S, C]``.
        margins: signed weights of the log-odds, ``[S, C]``.
    """

    top: Tensor
    others: Tensor
    rest: Tensor
    labels: Tensor
    margins: Tensor

    def slopes(self, first: int, count: int) -> Tensor:
        """Some of the probes as directions of the logits, ``[count, C, vocabulary]``.

        The gradient of the log-odds is ``onehot(top) - others``, that of a label's log-probability
        among the others ``onehot(label) - others``; both are written down, so that no graph of the
        softmax over the vocabulary is kept.
        """
        margins, labels = (x[first : first + count] for x in (self.margins, self.labels))
        rest = self.rest.expand_as(margins)
        slopes = -(margins + rest)[..., None] * self.others
        slopes.scatter_add_(2, self.top.expand_as(labels)[..., None], margins[..., None])
        return slopes.scatter_add_(2, labels[..., None], rest[..., None])


def curvature(margin: Tensor, reach: float) -> Tensor:
    """Twice the mean divergence over changes c ~ N(0, reach^2) of log-odds, over reach^2.

    Args:
        margin: log-odds of the likeliest token.
        reach: 0 for the limit, p (1 - p).
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    if reach == 0:
        return torch.sigmoid(margin) * torch.sigmoid(-margin)
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    change = reach * torch.as_tensor(nodes).to(margin)
    weights = torch.as_tensor(weights / weights.sum()).to(margin)
    before, after = margin[..., None], margin[..., None] + change
    divergence = F.softplus(-after) - F.softplus(-before) + torch.sigmoid(-before) * change
    found: Tensor = 2 * (divergence.clamp_min(0) @ weights) / reach**2
    return found
