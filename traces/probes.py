"""Probes: random directions of the logits whose second moment is what changing them costs.

The KL divergence from the full cache falls into two parts, exactly: whether the likeliest token
comes, and which of the others comes if it does not,

    KL = KL(Bernoulli p || Bernoulli changed p)  +  (1 - p) KL(others || changed others)

with p the likeliest token's probability. To second order the first part is p (1 - p) / 2 times the
squared change of its log-odds, and the second one half of Fisher's form of the others, scaled by
1 - p. A probe is the log-odds with a drawn sign and that weight, and a label drawn from the others.
In the mean this is what a label drawn from all tokens gives, but where the model is sure such
labels are nearly all the likeliest token and see nothing; there the log-odds are seen by each
probe. In one run eight of these ranked and sized plans as sixteen of those did, and ranked
quantised caches better (``benchmarks/results/predictions-h200.json``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Probes:
    """How a sample's probes are drawn.

    Args:
        count: S.
        seed: of the draws, each sample from its own stream.
    """

    count: int
    seed: int = 0

    def draw(self, log_p: Tensor, sample_id: str) -> Drawn:
        """What the probes of one sample are made of, the same on any device.

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
        log_top = log_p.gather(1, top[:, None])[:, 0]
        return Drawn(
            top=top,
            others=others,
            rest=(log_rest / 2).exp(),
            labels=labels.T.to(log_p.device),
            margins=signs.T.to(log_p) * ((log_top + log_rest) / 2).exp(),
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

    def before(self, weight: Tensor, first: int, count: int) -> Tensor:
        """The same directions before a linear output head, ``[count, C, hidden size]``.

        All probes share the direction of the others, which goes through the head's product once;
        that of one token is a row of its weight.

        Args:
            weight: of the head, ``[vocabulary, hidden size]``.
            first: of the probes.
            count: how many of them.
        """
        margins, labels = (x[first : first + count] for x in (self.margins, self.labels))
        rest = self.rest[:, None]
        shared = (self.others.to(weight.dtype) @ weight).to(self.others.dtype)
        top, rows = weight[self.top].to(shared.dtype), weight[labels].to(shared.dtype)
        return margins[..., None] * (top - shared) + rest * (rows - shared)
