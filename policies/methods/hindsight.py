"""References that look ahead: what a choice could reach if it knew what comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Future, Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FutureAttention(ScoredMethod):
    """The tokens that the observed queries will look at most. Hindsight: no server can run it.

    score[j] = attention[q, j] summed over the observed queries, mean over the head group
    keep     = highest scores

    Source: the usual oracle of eviction papers. Of all choices it keeps the most future attention
    mass; it does not lose the least.
    Cost: none that counts; it needs the observed tokens.
    """

    name = "future_attention"
    source = "hindsight reference"

    @property
    def needs(self) -> Needs:
        """The observed tokens."""
        return Needs(future=True)

    def scores(self, signals: Signals) -> Tensor:
        """Future attention mass."""
        return signals.future_attention().sum(-2).mean(1)


@dataclass(frozen=True)
class ProbeGreedy(ScoredMethod):
    """Drop, one by one, the token whose loss the model minds least. Hindsight, as above.

    r       = response of the drawn labels' log-likelihood to what was dropped so far, summed over
              blocks of ``block`` positions
    f[j]    = what dropping j adds to it; measured anew whenever ``refresh`` of the rest is gone
    drop    = the token of least |r + f[j]|^2, until none is left
    score[j] = when j was dropped

    Source: our own; the same second-order loss that predicts a policy's divergence from a trace,
    on the very sample that it is judged on. Each KV head for itself. Greedy, so no strict bound.
    Cost: O(P) steps of O(P S C / block); it needs the observed tokens and their probes.
    """

    name = "probe_greedy"
    source = "hindsight reference"

    block: int = parameter(16, "positions summed before squaring", unit="tokens", low=1)
    refresh: float = parameter(0.125, "share of the rest dropped between measurements", low=0)

    @property
    def needs(self) -> Needs:
        """The observed tokens and how the loss responds to them."""
        return Needs(future=True, probes=True)

    def scores(self, signals: Signals) -> Tensor:
        """The step at which each token was dropped."""
        import torch

        responses = _Responses.of(signals, self.block)
        heads, tokens, _ = signals.keys.shape
        dropped_at = torch.zeros(heads, tokens, device=signals.keys.device)
        alive = torch.ones(heads, tokens, dtype=torch.bool, device=signals.keys.device)
        step = 0
        while step < tokens:
            response, change = responses.now(alive)
            for _ in range(max(1, int((tokens - step) * self.refresh))):
                cost = (response[:, None] + change).square().sum(-1)
                chosen = cost.masked_fill(~alive, float("inf")).argmin(-1, keepdim=True)
                alive.scatter_(1, chosen, False)
                dropped_at.scatter_(1, chosen, float(step))
                added = change.gather(1, chosen[..., None].expand(-1, -1, change.shape[-1]))
                response = response + added[:, 0]
                step += 1
        return dropped_at


@dataclass(frozen=True)
class _Responses:
    """How the labels respond to a set of tokens being gone.

    Args:
        weights: unnormalised attention of the observed queries to the prompt, ``[H, G, C, P]``.
        others: the same to the observed tokens, summed, ``[H, G, C]``.
        rest: the observed tokens' part of the unnormalised output, ``[H, G, C, D]``.
        values: ``[H, P, D]``.
        probes: ``[H, S, G, C, D]``.
        along: probes times values, ``[H, B, P, S, K]``: B blocks of K queries.
        block: positions summed.
    """

    weights: Tensor
    others: Tensor
    rest: Tensor
    values: Tensor
    probes: Tensor
    along: Tensor
    block: int

    @staticmethod
    def of(signals: Signals, block: int) -> _Responses:
        """Everything that does not depend on what is gone."""
        import torch

        future: Future = signals.given("future")
        heads, tokens, _ = signals.keys.shape
        queries = future.queries.float().unflatten(0, (heads, -1)) * signals.scale
        keys = torch.cat((signals.keys, future.keys), 1).float()
        logits = queries @ keys.transpose(-1, -2).unsqueeze(1)
        later = torch.ones(queries.shape[2], queries.shape[2], device=keys.device).triu(1).bool()
        logits[..., tokens:].masked_fill_(later, -torch.inf)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        probes = signals.probes().float().unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4)
        values = signals.values.float()
        along = (probes @ values[:, None, None].transpose(-1, -2)).permute(0, 4, 1, 2, 3)
        along = along.flatten(1, 2)  # [H, P * S, G, C]
        return _Responses(
            weights[..., :tokens],
            weights[..., tokens:].sum(-1),
            weights[..., tokens:] @ future.values.float()[:, None],
            values,
            probes,
            _blocks(along, block).unflatten(2, (tokens, -1)),
            block,
        )

    def now(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Response to what is gone ``[H, F]``, and what each token's going adds ``[H, P, F]``."""
        everything, _ = self._output(self.weights)
        output, total = self._output(self.weights * alive[:, None, None])
        share = self.weights * alive[:, None, None] / total[..., None]
        odds = share / (1 - share).clamp_min(1e-6)
        before = (self.probes * (output - everything)[:, None]).sum(-1)  # [H, S, G, C]
        here = (self.probes * output[:, None]).sum(-1)
        response = _blocks(before, self.block).sum(-1)  # [H, B, S]
        weight = _blocks(odds.permute(0, 3, 1, 2), self.block)  # [H, B, P, K]
        change = weight @ _blocks(here, self.block).transpose(-1, -2)  # [H, B, P, S]
        change -= (self.along @ weight[..., None])[..., 0]
        return response.flatten(1), change.transpose(1, 2).flatten(2)

    def _output(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        total = weights.sum(-1) + self.others
        return (weights @ self.values[:, None] + self.rest) / total[..., None], total


def _blocks(rows: Tensor, block: int) -> Tensor:
    """``[H, R, G, C]`` as ``[H, B, R, G * block]``: positions in blocks, zeros after the last."""
    import torch.nn.functional as F

    padded = F.pad(rows, (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))
    grouped: Tensor = padded.permute(0, 3, 1, 2, 4).flatten(3)
    return grouped
