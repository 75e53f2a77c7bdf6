"""A policy live on the real model: the observed tokens are answered from a compressed prompt.

Each layer's prompt cache is compressed when that layer's prompt attention is complete, so the
prompt's own hidden states are those of the full cache; the observed tokens then run through the
whole model, and what one layer loses reaches the next. Many policies run as one batch; its first
row is the full cache, which the others are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.common.errors import KvtuneError
from kvtune.policies.compress import Compressed, attend, compress, merge
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.traces.models import LoadedModel
from kvtune.traces.seam import attending
from kvtune.traces.trace import LayerTrace, SampleRecord, Trace


@dataclass(frozen=True)
class LiveRun:
    """One policy on one sample.

    Args:
        kl: divergence from the full cache at every observed position, ``[C]`` nats.
        nll: negative log-likelihood of the actual next tokens, ``[C]`` nats.
        full_nll: the same under the full cache.
        correct: whether the likeliest next token is the actual one, ``[C]``.
        full_correct: the same under the full cache.
        kept: tokens that each head kept, ``[L, H]``: proof that the policy fired.
        footprint_bytes: of the compressed prompt, counted while compressing, lengths included.
    """

    kl: NDArray[np.float32]
    nll: NDArray[np.float32]
    full_nll: NDArray[np.float32]
    correct: NDArray[np.bool_]
    full_correct: NDArray[np.bool_]
    kept: NDArray[np.int64]
    footprint_bytes: int


def run_live(
    loaded: LoadedModel, trace: Trace, sample: SampleRecord, policies: Sequence[Policy]
) -> list[LiveRun]:
    """Run one sample's observed tokens under every policy, in one batch with the full cache.

    Raises:
        KvtuneError: the trace is another model's, or a policy has another shape.
    """
    trace.require_model(loaded.fingerprint)
    geometry = trace.geometry
    for policy in policies:
        policy.check_fits(geometry.layers, geometry.kv_heads)
    rows = [Policy.uniform(Option(), geometry.layers, geometry.kv_heads), *policies]
    cache = _BatchCache(trace, sample, rows, loaded.device)
    logits = _observed_logits(loaded, sample, cache, len(rows))
    targets = torch.as_tensor(_targets(sample), device=logits.device)
    return [_measure(logits, targets, row, cache) for row in range(1, len(rows))]


@dataclass
class _BatchCache:
    """Answers attention layer by layer; row b of the batch sees policy b's compressed prompt."""

    trace: Trace
    sample: SampleRecord
    policies: list[Policy]
    device: str
    kept: list[list[Tensor]] = field(default_factory=list)
    footprint_bytes: list[int] = field(default_factory=list)
    budgets: list[NDArray[np.int64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        prompt = len(self.sample.token_ids) - self.sample.observed
        heads = self.policies[0].layers * self.policies[0].kv_heads
        self.budgets = [policy.budgets(prompt) for policy in self.policies]
        self.kept = [[] for _ in self.policies]
        self.footprint_bytes = [4 * heads for _ in self.policies]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer, as the seam asks for it."""
        if window is not None and window < len(self.sample.token_ids):
            raise KvtuneError(f"layer {layer} attends to a sliding window; only full layers can run")
        signals = prompt_signals(
            self.trace.layer(self.sample.id, layer, device=self.device), scale
        )
        parts = [
            compress(policy, layer, budgets[layer].tolist(), signals)
            for policy, budgets in zip(self.policies, self.budgets, strict=True)
        ]
        for row, part in enumerate(parts):
            self.kept[row].append(part.counts)
            self.footprint_bytes[row] += part.footprint_bytes
        return _answer(q, k, v, parts, scale)


def prompt_signals(layer: LayerTrace, scale: float) -> Signals:
    """What the methods may look at, of one layer's recorded prompt."""
    prompt = layer.prompt_tokens
    observed = layer.k.shape[1] - prompt
    return Signals(
        layer.q[:, :-observed], layer.k[:, :prompt], layer.v[:, :prompt], scale, layer.column_sums
    )


def _answer(q: Tensor, k: Tensor, v: Tensor, parts: list[Compressed], scale: float) -> Tensor:
    """Merge each row's compressed prompt with the observed tokens; float32 inside."""
    heads, observed = k.shape[1], k.shape[2]
    queries = q.float().unflatten(1, (heads, -1))  # [B, H, G, C, D]
    keys = pad_sequence([p.keys.transpose(0, 1) for p in parts], batch_first=True)  # [B, n, H, D]
    values = pad_sequence([p.values.transpose(0, 1) for p in parts], batch_first=True)
    counts = torch.stack([part.counts for part in parts])  # [B, H]
    place = torch.arange(keys.shape[1], device=q.device)
    visible = (place < counts[..., None])[:, :, None, None]
    prompt = attend(
        queries, keys.transpose(1, 2)[:, :, None], values.transpose(1, 2)[:, :, None], visible, scale
    )
    causal = torch.ones(observed, observed, dtype=torch.bool, device=q.device).tril()
    recent = attend(queries, k.float()[:, :, None], v.float()[:, :, None], causal, scale)
    return merge(prompt, recent).flatten(1, 2).to(q.dtype)


@torch.no_grad()
def _observed_logits(
    loaded: LoadedModel, sample: SampleRecord, cache: _BatchCache, rows: int
) -> Tensor:
    """Logits at the observed positions, ``[B, C, vocabulary]``."""
    first = len(sample.token_ids) - sample.observed
    tokens = torch.as_tensor(sample.token_ids, device=loaded.device)[first:]
    positions = torch.arange(first, len(sample.token_ids), device=loaded.device)
    with attending(cache):
        result = loaded.model(
            input_ids=tokens.expand(rows, -1),
            position_ids=positions.expand(rows, -1),
            use_cache=False,
        )
    logits: Tensor = result.logits
    return logits


def _targets(sample: SampleRecord) -> NDArray[np.int64]:
    """The token after each observed position; the last has none and repeats itself."""
    observed = np.asarray(sample.token_ids[-sample.observed :], np.int64)
    return np.append(observed[1:], observed[-1])


def _measure(logits: Tensor, targets: Tensor, row: int, cache: _BatchCache) -> LiveRun:
    full, ours = logits[0].float().log_softmax(-1), logits[row].float().log_softmax(-1)
    if not bool(ours.isfinite().all()):
        raise KvtuneError(f"the policy {cache.policies[row].name!r} made the model's output NaN")
    kl = (full.exp() * (full - ours)).sum(-1)

    def nll(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, targets[:, None])[:, 0]

    return LiveRun(
        kl=kl.cpu().numpy(),
        nll=nll(ours).cpu().numpy(),
        full_nll=nll(full).cpu().numpy(),
        correct=(ours.argmax(-1) == targets).cpu().numpy(),
        full_correct=(full.argmax(-1) == targets).cpu().numpy(),
        kept=torch.stack(cache.kept[row]).cpu().numpy(),
        footprint_bytes=cache.footprint_bytes[row],
    )
