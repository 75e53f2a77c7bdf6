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
from torch.nn import functional

from kvtune.policies.apply import apply_each
from kvtune.policies.attention import attend, merge
from kvtune.policies.compressed import Compressed
from kvtune.policies.option import Option
from kvtune.policies.recorded import recorded_signals, signals_side_by_side
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
        tensors = {name: tensor.to(device).float() for name, tensor in trace.tensors.items()}
        return LayerReplay.of_signals(
            recorded_signals(tensors, trace.prompt_tokens, trace.scale, trace.layer, trace.rope)
        )

    @staticmethod
    def of_signals(signals: Signals) -> LayerReplay:
        """A prompt that was run with its future and probes."""
        future, heads = signals.given("future"), signals.keys.shape[0]
        return LayerReplay(
            signals,
            future.queries.unflatten(0, (heads, -1)),
            future.keys,
            future.values,
            signals.probes().unflatten(2, (heads, -1)),
        )

    @staticmethod
    def side_by_side(several: Sequence[LayerReplay]) -> LayerReplay:
        """One layer of several samples of one size as if their heads were one prompt's."""
        if len(several) == 1:
            return several[0]
        signals = [each.signals for each in several]
        queries, keys, values = (
            torch.cat([getattr(each, name) for each in several])
            for name in ("queries", "keys", "values")
        )
        probes = torch.cat([each.probes for each in several], 2)
        return LayerReplay(signals_side_by_side(signals), queries, keys, values, probes)

    @cached_property
    def recent(self) -> tuple[Tensor, Tensor]:
        """The observed tokens' attention among themselves, causal: the part that never changes."""
        count = self.keys.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=self.keys.device).tril()
        return attend(
            self.queries, self.keys[:, None], self.values[:, None], causal, self.signals.scale
        )

    @cached_property
    def whole(self) -> Compressed:
        """The uncompressed prompt."""
        keys, values = self.signals.keys, self.signals.values
        counts = torch.full(keys.shape[:1], self.signals.prompt_tokens, device=keys.device)
        return Compressed(keys, values, counts, (), padded=False)

    @cached_property
    def full(self) -> Tensor:
        """Attention output over the uncompressed cache, ``[H, G, C, D]``."""
        return self.output(self.whole)

    def output(self, prompt: Compressed) -> Tensor:
        """Attention output over a compressed prompt and the observed tokens, ``[..., H, G, C, D]``.

        Leading dimensions of the prompt, a batch of options, are kept.
        """
        return merge(self._past(prompt), self.recent)

    def response(self, prompt: Compressed, block: int) -> Tensor:
        """How the drawn labels' log-likelihood responds, ``[..., H, S, C / block]`` nats.

        Summed over a KV head's queries and over blocks of ``block`` positions: a lost token errs
        the same way at many positions, and squaring them one by one would not see it.
        """
        change = self._beyond_recent(prompt) - self._full_beyond_recent
        return in_blocks(change.transpose(-1, -2), block)

    def _past(self, prompt: Compressed) -> tuple[Tensor, Tensor]:
        """Attention to a compressed prompt alone, and its log-sum-exp."""
        return prompt.attended(self.queries, self.signals.scale)

    def _beyond_recent(self, prompt: Compressed) -> Tensor:
        """What the labels gain by seeing the prompt beside the recent tokens, ``[..., H, C, S]``.

        The merged output is ``recent + share * (past - recent)``, and probes are linear in it: each
        part meets them alone, in S numbers instead of D, and no merged output is written.
        """
        past, log_sum = self._past(prompt)
        share = (log_sum - self.recent[1]).sigmoid()[..., None]
        return (share * (self._by_probe(past) - self._recent_by_probe)).sum(-3)

    @cached_property
    def _full_beyond_recent(self) -> Tensor:
        return self._beyond_recent(self.whole)

    @cached_property
    def _recent_by_probe(self) -> Tensor:
        return self._by_probe(self.recent[0])

    def _by_probe(self, output: Tensor) -> Tensor:
        """Outputs ``[..., H, G, C, D]`` times the probes, ``[..., H, G, C, S]``."""
        return torch.einsum("...hgtd,sthgd->...hgts", output, self.probes)


def in_blocks(by_position: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension; the last block holds what is left, if anything is."""
    missing = -by_position.shape[-1] % block
    blocks: Tensor = functional.pad(by_position, (0, missing)).unflatten(-1, (-1, block))
    return blocks.sum(-1)


def replay_options(layer: LayerReplay, options: Sequence[Option], block: int) -> Tensor:
    """Responses of every KV head to every option, ``[H, O, S, C / block]`` nats.

    Options that keep equally many tokens run as one batch.
    """
    prompt = layer.signals.prompt_tokens
    batches: dict[int, list[int]] = {}
    for column, option in enumerate(options):
        batches.setdefault(option.budget.resolve(prompt), []).append(column)
    responses: dict[int, Tensor] = {}
    for budget, columns in batches.items():
        some = [options[column] for column in columns]
        for rows, prompts in apply_each(some, budget, layer.signals):
            found = layer.response(prompts, block)
            responses.update(zip((columns[row] for row in rows), found, strict=True))
    return torch.stack([responses[column] for column in range(len(options))], 1)
