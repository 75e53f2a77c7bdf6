"""Keyformer: accumulated attention, regularised by Gumbel noise and a rising temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.noise import gumbel
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import ALL_QUERIES, Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Keyformer(DecodeMethod):
    """Dropping tokens skews the softmax of those that stay: score on noisy, softened logits.

    score[j] += softmax_j((logit[q, j] + noise[q, j]) / temperature), mean over the head group
    temperature = start + t * (end - start) / horizon at generated token t; start for the prompt
    keep = last ``budget * recent_share`` + highest scores of the rest; the output itself is
    ordinary attention.

    The noise is standard Gumbel, a function of (seed, layer, query head, query, key) alone: a
    replay draws what the live run drew, whatever the batch. Without noise and at temperature 1
    this is H2O with another split.

    Source: Adnan et al., "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient
    Generative Inference", MLSys 2024, arXiv 2403.09054; temperatures 1 to 2 and 30 % recent as
    published. Their code's mask is one slot wide of the cache, so that after the prompt no
    generated token can become a key token; ``frozen_keys`` does the same, the default is the
    paper's rule. The authors' horizon is the number of tokens to generate; beyond it the
    temperature stays. Query heads that share a KV head are averaged (their models have none).
    Cost: two passes over the prompt's logits and Hq P^2 / 2 draws; then one row, its draws and one
    ranking a token and layer. State: one float an entry of a KV head.
    """

    name = "keyformer"
    source = "Adnan et al., MLSys 2024, arXiv 2403.09054"
    heads_are_alike = False  # each head has noise of its own

    recent_share: float = parameter(
        0.3, "share of the budget kept for the newest tokens", low=0, high=1
    )
    start: float = parameter(1.0, "temperature at the prompt", low=0.01, high=100)
    end: float = parameter(2.0, "temperature at the horizon", low=0.01, high=100)
    horizon: int = parameter(
        1024, "generated tokens until the end", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    noise: float = parameter(1.0, "scale of the noise; 0 for none", low=0, high=10)
    seed: int = parameter(0, "of the noise", low=0, high=2**31)
    frozen_keys: bool = parameter(False, "whether only prompt tokens can be key tokens")

    @property
    def needs(self) -> Needs:
        """Every prompt query."""
        return Needs(window=ALL_QUERIES)

    @property
    def entry_bits(self) -> int:
        """A float32: the score that the entry has gathered."""
        return 32

    @property
    def reads_step_number(self) -> bool:
        """Noise and temperature follow it."""
        return True

    def protected(self, budget: int) -> tuple[int, int]:
        """The recent window."""
        return 0, int(budget * self.recent_share)

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """Scores accumulated over the prompt."""
        import torch

        heads, tokens, _ = signals.keys.shape
        at = torch.arange(tokens, device=signals.keys.device)
        total = torch.zeros(heads, tokens, device=at.device)
        for first, rows in signals.attention_tiles():
            group, count = rows.shape[1:3]
            query_heads = _query_heads(signals.layer, torch.arange(heads, device=at.device), group)
            places = query_heads[..., None, None], at[first : first + count, None], at
            total += self._softened(rows, self.start, *places).sum(2).mean(1)
        return {"score": total}

    def work(self, shape: LayerShape, budget: int) -> Work:
        """Noise is drawn for every pair of tokens, 256 rows of them at a time."""
        pairs = float(shape.query_heads) * shape.prompt_tokens**2
        more = Work(20 * pairs, 80 * pairs, launches=68 * shape.prompt_tokens / 256)
        return super().work(shape, budget) + more

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Add the newest row, softened."""
        import torch

        query_heads = _query_heads(state.layer, state.heads, attention.shape[2])
        query = torch.full_like(state.heads[:1], state.now)
        places = query_heads[..., None], query, state.positions[:, :, None]
        row = self._softened(attention, self._temperature(state.generated), *places)
        state.statistics["score"] += row.mean(2)

    def worth(self, state: DecodeState) -> Tensor:
        """Accumulated score; under ``frozen_keys``, of prompt tokens only."""
        score = state.statistics["score"]
        if not self.frozen_keys:
            return score
        return score.masked_fill(state.positions >= state.prompt_tokens, -1.0)

    def _temperature(self, generated: int) -> float:
        return self.start + (self.end - self.start) * min(generated / self.horizon, 1.0)

    def _softened(self, rows: Tensor, temperature: float, *places: Tensor) -> Tensor:
        """Softmax of noisy logits; a row's logits but for a constant are its probabilities' logs.

        Args:
            rows: attention, ``[..., n]``; what is zero stays zero.
            temperature: divides the noisy logits.
            places: query heads, queries and keys, which broadcast to the rows.
        """
        logits = rows.log()
        if self.noise:
            logits += self.noise * gumbel(self.seed, *places)
        return (logits / temperature).softmax(-1)


def _query_heads(layer: int, kv_heads: Tensor, group: int) -> Tensor:
    """A number for each query head of the model, ``[H, G]``."""
    import torch

    members = torch.arange(group, device=kv_heads.device)
    return layer * 2**20 + kv_heads[:, None] * group + members
