"""A policy live on the real model: the observed tokens are answered from a compressed prompt.

Each layer's prompt cache is compressed when that layer's prompt attention is complete, so the
prompt's own hidden states are those of the full cache; the observed tokens then run through the
whole model, and what one layer loses reaches the next. Many policies run as one batch, and are
measured against the full cache, which is run once a sample in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import apply_together, linked
from kvtune.policies.attention import attend, merge
from kvtune.policies.compressed import Compressed
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.runtime.prompts import Prompt, refuse_window
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_observed
from kvtune.traces.samples import Sample


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
    loaded: LoadedModel,
    sample: Sample,
    prompt: Prompt,
    policies: Sequence[Policy],
    full: Tensor | None = None,
) -> list[LiveRun]:
    """Run one sample's observed tokens under every policy, in one batch.

    Args:
        loaded: the model.
        sample: what it reads.
        prompt: the sample's prompt, freshly run or from a trace of the same model.
        policies: for this model's shape.
        full: what ``full_cache`` says of this sample and prompt; None runs it here.

    Raises:
        KvtuneError: a policy has another shape, or makes the output NaN.
    """
    geometry = loaded.geometry
    for policy in policies:
        policy.check_fits(geometry.layers, geometry.kv_heads)
    if full is None:
        full = full_cache(loaded, sample, prompt)
    logits, cache = _answered(loaded, sample, prompt, policies)
    targets = torch.tensor(sample.targets, device=logits.device)
    kept = torch.stack(cache.kept, 1).cpu()
    return [
        measured(policy, full, logits[row], targets, kept[row], cache.footprint_bytes[row])
        for row, policy in enumerate(policies)
    ]


def full_cache(loaded: LoadedModel, sample: Sample, prompt: Prompt) -> Tensor:
    """Log-probabilities under the uncompressed prompt, ``[C, vocabulary]`` float32."""
    geometry = loaded.geometry
    whole = Policy.uniform(Option(), geometry.layers, geometry.kv_heads)
    return _answered(loaded, sample, prompt, [whole])[0][0].float().log_softmax(-1)


def _answered(
    loaded: LoadedModel, sample: Sample, prompt: Prompt, policies: Sequence[Policy]
) -> tuple[Tensor, _BatchCache]:
    """Logits ``[B, C, vocabulary]`` of the observed tokens, and the cache that answered them."""
    budgets = [policy.settle(sample.prompt, prompt) for policy in policies]
    cache = _BatchCache(prompt, policies, budgets)
    observed = sample.token_ids[sample.prompt :]
    with torch.no_grad():
        logits = run_observed(loaded, observed, sample.prompt, cache, copies=len(policies))
    return logits, cache


class _BatchCache:
    """Answers attention layer by layer; row b of the batch sees policy b's compressed prompt."""

    def __init__(
        self, prompt: Prompt, policies: Sequence[Policy], budgets: list[NDArray[np.int64]]
    ) -> None:
        self.prompt, self.policies, self.budgets = prompt, policies, budgets
        self.kept: list[Tensor] = []  # [B, H] a layer
        self.footprint_bytes = [footprint_of_lengths(p.layers, p.kv_heads) for p in policies]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer, as the seam asks for it."""
        options = (option for policy in self.policies for option in policy.heads[layer])
        depth = self.policies[0].layers
        signals = linked(self.prompt(layer), options, depth, self.prompt)
        refuse_window(layer, window, signals.prompt_tokens + q.shape[2])
        planned = [budgets[layer].tolist() for budgets in self.budgets]
        part = apply_together(self.policies, layer, planned, signals)
        self.kept.append(part.counts)
        for row, taken in enumerate(part.footprint_bytes):
            self.footprint_bytes[row] += taken
        return answer(q, k, v, part, scale)


def answer(q: Tensor, k: Tensor, v: Tensor, prompt: Compressed, scale: float) -> Tensor:
    """Attention of observed tokens to a compressed prompt and to themselves; float32 inside.

    Args:
        q: post-RoPE queries ``[B, Hq, C, D]``.
        k: of the same tokens ``[B, H, C, D]``.
        v: likewise.
        prompt: of ``B`` policies, or of one.
        scale: factor of the scores before the softmax.
    """
    heads, observed = k.shape[1], k.shape[2]
    queries = q.float().unflatten(1, (heads, -1))  # [B, H, G, C, D]
    keys, values = prompt.keys[:, :, None], prompt.values[:, :, None]
    past = attend(queries, keys, values, prompt.visible(queries), scale, prompt.weights)
    causal = torch.ones(observed, observed, dtype=torch.bool, device=q.device).tril()
    recent = attend(queries, k.float()[:, :, None], v.float()[:, :, None], causal, scale)
    return merge(past, recent).flatten(1, 2).to(q.dtype)


def measured(
    policy: Policy, full: Tensor, logits: Tensor, targets: Tensor, kept: Tensor, taken: int
) -> LiveRun:
    """One policy's answers beside those of the full cache.

    Args:
        policy: which has run.
        full: log-probabilities under the full cache, ``[C, vocabulary]``.
        logits: under the policy, likewise.
        targets: the actual next tokens, ``[C]``.
        kept: prompt tokens that each head kept, ``[L, H]``.
        taken: bytes of the compressed prompt.

    Raises:
        KvtuneError: the policy has made the output NaN.
    """
    ours = logits.float().log_softmax(-1)
    if not bool(ours.isfinite().all()):
        raise KvtuneError(f"the policy {policy.name!r} made the model's output NaN")
    kl = (full.exp() * (full - ours)).sum(-1)

    def nll(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, targets[:, None])[:, 0]

    return LiveRun(
        kl=kl.cpu().numpy(),
        nll=nll(ours).cpu().numpy(),
        full_nll=nll(full).cpu().numpy(),
        correct=(ours.argmax(-1) == targets).cpu().numpy(),
        full_correct=(full.argmax(-1) == targets).cpu().numpy(),
        kept=kept.numpy(),
        footprint_bytes=taken,
    )
