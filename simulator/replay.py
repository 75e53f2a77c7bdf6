"""Replay: what an option does to a layer's attention output, and how the loss responds.

A trace holds one full-cache run. Replaying an option answers the observed queries from the
compressed prompt instead and leaves everything else as it was (open loop). The change of the
attention output, multiplied with the probes, is the first-order change of the log-likelihood of
labels drawn from the model; its square is, in the mean, twice the KL divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvtune.policies.compress import Compressed, Kept, attend, merge, select, store
from kvtune.policies.option import Option
from kvtune.policies.signals import Signals
from kvtune.traces.trace import LayerTrace


@dataclass(frozen=True)
class LayerReplay:
    """One layer of one sample, ready to be replayed under any option.

    Args:
        signals: the prompt, as methods see it.
        queries: of the observed tokens, ``[H, G, C, D]`` float32.
        keys: of the observed tokens, ``[H, C, D]`` float32; these stay uncompressed.
        values: likewise.
        probes: gradient of drawn labels' log-likelihood, ``[S, C, H, G, D]`` float32.
    """

    signals: Signals
    queries: Tensor
    keys: Tensor
    values: Tensor
    probes: Tensor

    @staticmethod
    def of(trace: LayerTrace, device: str = "cpu") -> LayerReplay:
        """Split a layer's trace into its prompt and its observed tokens."""
        keys, values, queries = (x.to(device).float() for x in (trace.k, trace.v, trace.q))
        heads, prompt = keys.shape[0], trace.prompt_tokens
        observed = keys.shape[1] - prompt
        sums = None if trace.column_sums is None else trace.column_sums.to(device)
        signals = Signals(
            queries[:, :-observed], keys[:, :prompt], values[:, :prompt], trace.scale, sums
        )
        return LayerReplay(
            signals,
            queries[:, -observed:].unflatten(0, (heads, -1)),
            keys[:, prompt:],
            values[:, prompt:],
            trace.probes.to(device).float().unflatten(2, (heads, -1)),
        )

    @cached_property
    def recent(self) -> tuple[Tensor, Tensor]:
        """The observed tokens' attention among themselves, causal: the part that never changes."""
        count = self.keys.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=self.keys.device).tril()
        return attend(
            self.queries, self.keys[:, None], self.values[:, None], causal, self.signals.scale
        )

    @cached_property
    def full(self) -> Tensor:
        """Attention output over the uncompressed cache, ``[H, G, C, D]``."""
        return self.output(
            store([Option()] * len(self.keys), _everything(self.signals), self.signals)
        )

    def output(self, prompt: Compressed) -> Tensor:
        """Attention output over a compressed prompt and the observed tokens, ``[H, G, C, D]``."""
        position = torch.arange(prompt.keys.shape[1], device=self.keys.device)
        visible = (position < prompt.counts[:, None])[:, None, None]
        part = attend(
            self.queries, prompt.keys[:, None], prompt.values[:, None], visible, self.signals.scale
        )
        return merge(part, self.recent)

    def response(self, prompt: Compressed, block: int) -> Tensor:
        """How the drawn labels' log-likelihood responds, ``[H, S, C / block]`` nats.

        Summed over a KV head's queries and over blocks of ``block`` positions: a lost token errs
        the same way at many positions, and squaring them one by one would not see it.
        """
        change = self.output(prompt) - self.full
        by_position = torch.einsum("hgtd,sthgd->hst", change, self.probes)
        whole = by_position[..., : by_position.shape[-1] // block * block]
        return whole.unflatten(-1, (-1, block)).sum(-1)


def replay_options(layer: LayerReplay, options: Sequence[Option], block: int) -> Tensor:
    """Responses of every KV head to every option, ``[H, O, S, C / block]`` nats."""
    heads, prompt = layer.signals.keys.shape[:2]
    chosen, responses = {}, []
    for option in options:
        budget = option.budget.resolve(prompt)
        rows = [option] * heads
        if (option.method, budget) not in chosen:
            chosen[option.method, budget] = select(rows, [budget] * heads, layer.signals)
        kept = chosen[option.method, budget]
        responses.append(layer.response(store(rows, kept, layer.signals), block))
    return torch.stack(responses, 1)


def _everything(signals: Signals) -> Kept:
    heads, prompt = signals.keys.shape[:2]
    device = signals.keys.device
    return Kept(
        torch.arange(prompt, device=device).expand(heads, -1),
        torch.full((heads,), prompt, device=device),
    )
