"""References that look ahead: what a choice could reach if it knew what comes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.policies.gathering import other_tokens
from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
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
    Cost: between measurements f stands still, so that a drop changes the others' losses by a row of
    f's products with itself; P such rows, and O(P C (S + D) + P^2 S C / block) to measure what is
    left each time. It needs the observed tokens and their probes.
    """

    name = "probe_greedy"
    source = "hindsight reference"

    block: int = parameter(
        16, "positions summed before squaring", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    refresh: float = parameter(
        0.125, "share of the rest dropped between measurements", low=0, high=1
    )

    @property
    def needs(self) -> Needs:
        """The observed tokens and how the loss responds to them."""
        return Needs(future=True, probes=True)

    def scores(self, signals: Signals) -> Tensor:
        """The step at which each token was dropped."""
        import torch

        left = _Responses.of(signals, self.block)
        heads, tokens, _ = signals.keys.shape
        place = torch.arange(tokens, device=signals.keys.device).expand(heads, tokens)
        dropped_at = torch.zeros(heads, tokens, device=place.device)
        step = 0
        while step < tokens:
            count = max(1, int((tokens - step) * self.refresh))
            order = _cheapest(*left.now(), count)
            at = torch.arange(step, step + count, device=place.device, dtype=torch.float32)
            dropped_at.scatter_(1, place.gather(1, order), at.expand(heads, count))
            stay = other_tokens(order, tokens - step)
            left, place, step = left.only(stay), place.gather(1, stay), step + count
        return dropped_at


def _cheapest(response: Tensor, change: Tensor, count: int) -> Tensor:
    """The ``count`` tokens that greedy drops one after another, in order, ``[H, count]``.

    |r + f[j]|^2 but for |r|^2 is kept for every token: dropping i adds 2 f[i] f[j]. The steps are
    tiny and wait for each other, so that the CPU takes them whatever the device.

    Args:
        response: r, ``[H, F]``.
        change: f, ``[H, n, F]``.
        count: up to n.
    """
    import numpy as np
    import torch

    own = change.square().sum(-1) + 2 * (change @ response[..., None])[..., 0]
    cost, products = own.cpu().numpy(), (2 * change @ change.transpose(-1, -2)).cpu().numpy()
    head = np.arange(len(cost))
    order = np.empty((len(cost), count), np.int64)
    for step in range(count):
        chosen = cost.argmin(1)
        order[:, step] = chosen
        cost += products[head, chosen]
        cost[head, chosen] = np.inf
    return torch.from_numpy(order).to(change.device)


@dataclass(frozen=True)
class _Responses:
    """How the labels respond to tokens being gone, n of which are left.

    Args:
        weights: unnormalised attention of the observed queries to those left, ``[H, G, C, n]``.
        others: the same to the observed tokens, summed, ``[H, G, C]``.
        rest: the observed tokens' part of the unnormalised output, ``[H, G, C, D]``.
        values: ``[H, n, D]``.
        probes: ``[H, S, G, C, D]``.
        along: probes times values, ``[H, B, n, S, K]``: B blocks of K queries.
        whole: output with nothing gone, ``[H, G, C, D]``.
        block: positions summed.
    """

    weights: Tensor
    others: Tensor
    rest: Tensor
    values: Tensor
    probes: Tensor
    along: Tensor
    whole: Tensor
    block: int

    @staticmethod
    def of(signals: Signals, block: int) -> _Responses:
        """The responses before any token has been dropped."""
        import torch

        future: Future = signals.given("future")
        heads, tokens, _ = signals.keys.shape
        queries = future.queries.float().unflatten(0, (heads, -1)) * signals.scale
        block = min(block, queries.shape[2])  # a longer one is padded with nothing but zeros
        keys = torch.cat((signals.keys, future.keys), 1).float()
        logits = queries @ keys.transpose(-1, -2).unsqueeze(1)
        later = torch.ones(queries.shape[2], queries.shape[2], device=keys.device).triu(1).bool()
        logits[..., tokens:].masked_fill_(later, -torch.inf)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        probes = signals.probes().float().unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4)
        values = signals.values.float()
        along = (probes @ values[:, None, None].transpose(-1, -2)).permute(0, 4, 1, 2, 3)
        along = _blocks(along.flatten(1, 2), block).unflatten(2, (tokens, -1))
        past, observed = weights[..., :tokens], weights[..., tokens:]
        others, rest = observed.sum(-1), observed @ future.values.float()[:, None]
        whole, _ = _output(past, values, others, rest)
        return _Responses(past, others, rest, values, probes, along, whole, block)

    def only(self, stay: Tensor) -> _Responses:
        """The same with only some of the tokens left, ``[H, m]``."""
        import torch

        head = torch.arange(len(stay), device=stay.device)[:, None]
        return replace(
            self,
            weights=self.weights.permute(0, 3, 1, 2)[head, stay].permute(0, 2, 3, 1),
            values=self.values[head, stay],
            along=self.along.transpose(1, 2)[head, stay].transpose(1, 2),
        )

    def now(self) -> tuple[Tensor, Tensor]:
        """Response to what is gone ``[H, F]``, and what each token's going adds ``[H, n, F]``."""
        output, total = _output(self.weights, self.values, self.others, self.rest)
        share = self.weights / total[..., None]
        odds = share / (1 - share).clamp_min(1e-6)
        before = (self.probes * (output - self.whole)[:, None]).sum(-1)  # [H, S, G, C]
        here = (self.probes * output[:, None]).sum(-1)
        response = _blocks(before, self.block).sum(-1)  # [H, B, S]
        weight = _blocks(odds.permute(0, 3, 1, 2), self.block)  # [H, B, n, K]
        change = weight @ _blocks(here, self.block).transpose(-1, -2)  # [H, B, n, S]
        change -= (self.along @ weight[..., None])[..., 0]
        return response.flatten(1), change.transpose(1, 2).flatten(2)


def _output(weights: Tensor, values: Tensor, others: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    total = weights.sum(-1) + others
    return (weights @ values[:, None] + rest) / total[..., None], total


def _blocks(rows: Tensor, block: int) -> Tensor:
    """``[H, R, G, C]`` as ``[H, B, R, G * block]``: positions in blocks, zeros after the last."""
    import torch.nn.functional as F

    padded = F.pad(rows, (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))
    grouped: Tensor = padded.permute(0, 3, 1, 2, 4).flatten(3)
    return grouped
