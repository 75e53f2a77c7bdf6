"""A policy applied to one layer's prompt: what replay and the live cache both run.

Methods choose, formats store; here their choices meet the tensors, and the bytes are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class Kept:
    """Which tokens of a layer stay.

    Args:
        indices: ``[H, n]`` int64 ascending; of row h only the first ``counts[h]`` are real.
        counts: ``[H]`` int64.
    """

    indices: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Compressed:
    """One layer's prompt as a reader sees it.

    Args:
        keys: ``[H, n, D]``, read back from storage; padded like ``Kept.indices``.
        values: ``[H, n, D]``.
        counts: ``[H]`` int64.
        footprint_bytes: payload and scales of all heads.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    footprint_bytes: int


def select(options: Sequence[Option], budgets: Sequence[int], signals: Signals) -> Kept:
    """Ask each head's method for its tokens; heads that share a choice ask once."""
    chosen = {
        (option.method, budget): option.method.keep(signals, budget)
        for option, budget in set(zip(options, budgets, strict=True))
    }
    rows = [
        chosen[option.method, budget][head]
        for head, (option, budget) in enumerate(zip(options, budgets, strict=True))
    ]
    counts = torch.tensor([len(row) for row in rows], device=signals.keys.device)
    return Kept(pad_sequence(rows, batch_first=True), counts)


def store(options: Sequence[Option], kept: Kept, signals: Signals) -> Compressed:
    """Gather what stays and pass it through each head's formats."""
    at = kept.indices[..., None].expand(-1, -1, signals.keys.shape[-1])
    keys, values = signals.keys.gather(-2, at), signals.values.gather(-2, at)
    for form in {option.keys for option in options}:
        rows = [head for head, option in enumerate(options) if option.keys == form]
        keys[rows] = form.roundtrip(keys[rows], kept.counts[rows], "keys")
    for form in {option.values for option in options}:
        rows = [head for head, option in enumerate(options) if option.values == form]
        values[rows] = form.roundtrip(values[rows], kept.counts[rows], "values")
    head_dim = keys.shape[-1]
    counted = zip(options, kept.counts.tolist(), strict=True)
    return Compressed(
        keys,
        values,
        kept.counts,
        sum(option.footprint(count, head_dim) for option, count in counted),
    )


def compress(policy: Policy, layer: int, budgets: Sequence[int], signals: Signals) -> Compressed:
    """One layer of a policy, ``budgets`` ``[H]`` being its planned tokens; changes nothing."""
    options = policy.heads[layer]
    final = policy.split(layer, list(budgets), signals)
    return store(options, select(options, final, signals), signals)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over one part of a cache, to be merged with others by its log-sum-exp.

    Args:
        queries: ``[..., Q, D]``.
        keys: ``[..., n, D]``.
        values: ``[..., n, D]``.
        visible: broadcasts to ``[..., Q, n]``; False is masked. None where all is visible.
        scale: multiplies the logits.

    Returns:
        output ``[..., Q, D]`` and log-sum-exp ``[..., Q]``; minus infinity where nothing is
        visible, with an output of zero.
    """
    weights = (queries * scale) @ keys.transpose(-1, -2)
    if weights.shape[-1] == 0:
        empty = weights.sum(-1)
        return empty[..., None].expand(*empty.shape, values.shape[-1]), empty - torch.inf
    if visible is not None:
        weights.masked_fill_(~visible, -torch.inf)
    largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).min)
    weights.sub_(largest).exp_()  # in place: this is most of what replay does
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp_min(torch.finfo(weights.dtype).tiny)
    return output, (total.log() + largest)[..., 0]


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The attention output over two parts together, from their outputs and log-sum-exps."""
    share = (first[1] - second[1]).sigmoid()[..., None]
    return first[0] * share + second[0] * (1 - share)
