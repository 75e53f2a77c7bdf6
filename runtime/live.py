"""A policy live on the real model: the observed tokens are answered from a compressed prompt.

Each layer's prompt cache is compressed when that layer's prompt attention is complete, so the
prompt's own hidden states are those of the full cache; the observed tokens then run through the
whole model, and what one layer loses reaches the next. Many policies run as one batch, and are
measured against the full cache, which is run once a sample in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """The form that is kept in a file."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> LiveRun:
        """A run that was kept."""
        given: dict[str, Any] = dict(arrays)
        return LiveRun(**given | {"footprint_bytes": int(arrays["footprint_bytes"])})


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
        full: what ``full_cache`` says of this sample and prompt; None runs it beside them.

    Raises:
        KvtuneError: a policy has another shape, or makes the output NaN.
    """
    if full is None:
        return run_beside_full(loaded, sample, prompt, policies)[1]
    logits, cache = _answered(loaded, sample, prompt, policies)
    reference = Reference.of(full, sample)
    return [_measured(reference, logits, row, cache) for row in range(len(policies))]


def run_beside_full(
    loaded: LoadedModel, sample: Sample, prompt: Prompt, policies: Sequence[Policy]
) -> tuple[Tensor, list[LiveRun]]:
    """What ``full_cache`` and ``run_live`` say.

    On a CPU in one batch: one row more is less than a pass. Elsewhere the whole prompt's row would
    make all others as long as it is (``Compressed.attended``), so the full cache is run apart.
    """
    if torch.device(loaded.device).type != "cpu":
        full = full_cache(loaded, sample, prompt)
        return full, run_live(loaded, sample, prompt, policies, full)
    logits, cache = _answered(loaded, sample, prompt, [full_policy(loaded), *policies])
    full = logits[0].float().log_softmax(-1)
    reference = Reference.of(full, sample)
    return full, [_measured(reference, logits, row, cache) for row in range(1, len(policies) + 1)]


def full_cache(loaded: LoadedModel, sample: Sample, prompt: Prompt) -> Tensor:
    """Log-probabilities under the uncompressed prompt, ``[C, vocabulary]`` float32."""
    return _answered(loaded, sample, prompt, [full_policy(loaded)])[0][0].float().log_softmax(-1)


def full_policy(loaded: LoadedModel) -> Policy:
    """The policy that keeps every token as the model computes it."""
    return Policy.uniform(Option(), loaded.geometry.layers, loaded.geometry.kv_heads)


def _answered(
    loaded: LoadedModel, sample: Sample, prompt: Prompt, policies: Sequence[Policy]
) -> tuple[Tensor, _BatchCache]:
    """Logits ``[B, C, vocabulary]`` of the observed tokens, and the cache that answered them."""
    for policy in policies:
        policy.check_fits(loaded.geometry.layers, loaded.geometry.kv_heads)
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
    past = prompt.attended(queries, scale)
    causal = torch.ones(observed, observed, dtype=torch.bool, device=q.device).tril()
    recent = attend(queries, k.float()[:, :, None], v.float()[:, :, None], causal, scale)
    return merge(past, recent).flatten(1, 2).to(q.dtype)


@dataclass(frozen=True)
class Reference:
    """What all policies on a sample are measured against, computed once.

    Args:
        full: log-probabilities under the full cache, ``[C, vocabulary]``.
        probabilities: their exponentials.
        targets: the actual next tokens, ``[C]``.
        nll: their negative log-likelihood under the full cache, ``[C]``.
        correct: whether the full cache's likeliest tokens are these, ``[C]``.
    """

    full: Tensor
    probabilities: Tensor
    targets: Tensor
    nll: NDArray[np.float32]
    correct: NDArray[np.bool_]

    @staticmethod
    def of(full: Tensor, sample: Sample) -> Reference:
        """Of one sample."""
        targets = torch.tensor(sample.targets, device=full.device)
        correct = full.argmax(-1) == targets
        return Reference(full, full.exp(), targets, _nll(full, targets), correct.cpu().numpy())


def _nll(log_probabilities: Tensor, targets: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = -log_probabilities.gather(-1, targets[:, None])[:, 0].cpu().numpy()
    return found


def _measured(reference: Reference, logits: Tensor, row: int, cache: _BatchCache) -> LiveRun:
    kept = torch.stack(cache.kept, 1)[row]
    taken = cache.footprint_bytes[row]
    return measured(cache.policies[row], reference, logits[row], kept, taken)


def measured(
    policy: Policy, reference: Reference, logits: Tensor, kept: Tensor, taken: int
) -> LiveRun:
    """One policy's answers beside those of the full cache.

    Args:
        policy: which has run.
        reference: of the sample.
        logits: under the policy, ``[C, vocabulary]``.
        kept: prompt tokens that each head kept, ``[L, H]``.
        taken: bytes of the compressed prompt.

    Raises:
        KvtuneError: the policy has made the output NaN.
    """
    ours = logits.float().log_softmax(-1)
    kl = (reference.full - ours).mul_(reference.probabilities).sum(-1)
    if not bool(kl.isfinite().all()):  # as it is where all of the output is
        raise KvtuneError(f"the policy {policy.name!r} made the model's output NaN")
    return LiveRun(
        kl=kl.cpu().numpy(),
        nll=_nll(ours, reference.targets),
        full_nll=reference.nll,
        correct=(ours.argmax(-1) == reference.targets).cpu().numpy(),
        full_correct=reference.correct,
        kept=kept.cpu().numpy(),
        footprint_bytes=taken,
    )
