"""Expected Attention: what queries yet to come would look at, from their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.rotary import mean_turn
from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpectedAttention(ScoredMethod):
    """Future queries are taken as Gaussian, with the mean and covariance of the prompt's.

    mu, S    = mean and covariance of the queries before RoPE, the first four left out, turned by
               the mean rotation of the next ``ahead`` positions
    z[j]     = scale * k[j] mu + scale^2 / 2 * k[j] S k[j]
    score[j] = (mean over the head group of softmax(z)[j] + epsilon) * |v[j]|
    keep     = first ``sinks`` + highest scores of the rest; the softmax leaves the sinks out

    Source: Devoto et al., "Expected Attention", arXiv 2510.00636, 3; defaults are the authors'
    (kvpress). Nothing differs at the prompt's end but for prompts of at most four tokens, whose
    queries are all counted. Their variant with statistics of a corpus is not offered.
    Cost: O(Hq P D^2) once a prompt, no attention weights; no state.
    """

    name = "expected_attention"
    source = "Devoto et al., arXiv 2510.00636"

    ahead: int = parameter(512, "future positions averaged over", unit="tokens", low=1, high=65536)
    sinks: int = parameter(
        4, "first tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    covariance: bool = parameter(True, "whether the queries' spread counts")
    value_norm: bool = parameter(True, "whether scores are weighted with the values' length")
    epsilon: float = parameter(0.0, "added before weighting with the values' length", low=0, high=1)

    @property
    def needs(self) -> Needs:
        """Moments of the queries before RoPE, and positions to turn them to."""
        return Needs(query_moments=True, rope=True)

    def protected(self, budget: int) -> tuple[int, int]:
        """The first tokens always stay."""
        return self.sinks, 0

    def scores(self, signals: Signals) -> Tensor:
        """Expected attention, weighted with the values' length."""
        logits = self._logits(signals)
        sinks = min(self.sinks, signals.prompt_tokens - 1)
        logits[..., :sinks] = -float("inf")
        expected = logits.softmax(-1).mean(1)
        if self.value_norm:
            expected = (expected + self.epsilon) * signals.values.float().norm(dim=-1)
        return expected

    def _logits(self, signals: Signals) -> Tensor:
        """Logarithm of the expected weight of every key, ``[H, G, P]``."""
        mean, covariance = self._turned(signals)
        keys = signals.keys.float()[:, None]
        logits = (keys @ mean[..., None])[..., 0] * signals.scale
        if self.covariance:
            logits += ((keys @ covariance) * keys).sum(-1) * (signals.scale**2 / 2)
        return logits

    def _turned(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """The queries' moments as seen from the positions to come."""
        mean, covariance = signals.query_moments()
        rope = signals.rope
        if rope is None:
            return mean, covariance

        def turned(vectors: Tensor) -> Tensor:
            there = mean_turn(vectors, signals.prompt_tokens, self.ahead, rope)
            return there * rope.attention_factor

        return turned(mean), turned(turned(covariance).transpose(-1, -2))

    def work(self, shape: LayerShape, budget: int) -> Work:
        """The quadratic form of every key beside the moments, its numbers moved four times."""
        numbers = self.covariance * shape.query_heads * shape.prompt_tokens * shape.head_dim
        form = Work(flops=2.0 * numbers * shape.head_dim, moved_bytes=4 * 4.0 * numbers)
        return super().work(shape, budget) + form
