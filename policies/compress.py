"""A policy applied to one layer's prompt: what replay and the live cache both run.

Methods choose, formats store; here their choices meet the tensors, and the bytes are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.format import Format, Role
from kvtune.policies.method import Method
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class Kept:
    """Which tokens of a layer stay, under several policies at once.

    Args:
        indices: ``[B, H, n]`` int64 ascending; of a row only the first ``counts`` are real.
        counts: ``[B, H]`` int64.
        sizes: the counts once more as plain numbers, so that nobody waits for the device.
        merged: keys and values ``[n, D]`` of the rows, counted through ``[B, H]``, whose method
            stores others than the kept tokens' own.
    """

    indices: Tensor
    counts: Tensor
    sizes: tuple[tuple[int, ...], ...]
    merged: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """One layer's prompt as a reader sees it, under one policy ``[H, ...]`` or several ``[B, H]``.

    Args:
        keys: ``[..., H, n, D]``, read back from storage; padded like ``Kept.indices``.
        values: ``[..., H, n, D]``.
        counts: ``[..., H]`` int64.
        footprint_bytes: payload and scales of all heads, of each policy.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    footprint_bytes: tuple[int, ...]


Rows = Sequence[Sequence[Option]]  # [B][H]


def ask(
    rows: Rows, budgets: Sequence[Sequence[int]], signals: Signals
) -> tuple[list[Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Ask each head's method for its tokens; heads and policies that share a choice ask once.

    Returns:
        Tokens of each row, counted through ``[B, H]``, ascending; and ``Kept.merged``.
    """
    asked = [
        [(option.method, budget) for option, budget in zip(options, wanted, strict=True)]
        for options, wanted in zip(rows, budgets, strict=True)
    ]
    chosen = {
        (method, budget): method.keep(signals, budget)
        for method, budget in dict.fromkeys(choice for choices in asked for choice in choices)
    }
    merged = {choice: choice[0].merge(signals, kept) for choice, kept in chosen.items()}
    rows_of = [(choice, head) for choices in asked for head, choice in enumerate(choices)]
    instead = {
        row: (both[0][head], both[1][head])
        for row, (choice, head) in enumerate(rows_of)
        if (both := merged[choice]) is not None
    }
    return [chosen[choice][head] for choice, head in rows_of], instead


def select(rows: Rows, budgets: Sequence[Sequence[int]], signals: Signals) -> Kept:
    """What the heads' methods choose, side by side."""
    lists, merged = ask(rows, budgets, signals)
    heads = len(rows[0])
    sizes = [len(row) for row in lists]
    counts = torch.tensor(sizes, device=signals.keys.device).unflatten(0, (-1, heads))
    indices = pad_sequence(lists, batch_first=True).unflatten(0, (-1, heads))
    by_policy = tuple(tuple(sizes[at : at + heads]) for at in range(0, len(sizes), heads))
    return Kept(indices, counts, by_policy, merged)


def kept_of(method: Method, signals: Signals, budget: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[H, n, D]`` that one method stores of all heads, before any format."""
    at = method.keep(signals, budget)
    merged = method.merge(signals, at)
    if merged is not None:
        return merged
    wide = at[..., None].expand(*at.shape, signals.keys.shape[-1])
    return signals.keys.gather(1, wide), signals.values.gather(1, wide)


def store(rows: Rows, kept: Kept, signals: Signals) -> Compressed:
    """Gather what stays and pass it through each head's formats, all heads of a format at once."""
    keys = _stored(signals.keys, kept, [o.keys for options in rows for o in options], "keys")
    values = _stored(
        signals.values, kept, [o.values for options in rows for o in options], "values"
    )
    head_dim = keys.shape[-1]
    footprint = tuple(
        sum(option.footprint(count, head_dim) for option, count in zip(options, sizes, strict=True))
        for options, sizes in zip(rows, kept.sizes, strict=True)
    )
    return Compressed(keys, values, kept.counts, footprint)


def _stored(whole: Tensor, kept: Kept, forms: Sequence[Format], role: Role) -> Tensor:
    """``[B, H, n, D]`` of ``[H, P, D]``, each (policy, head) row in its own format."""
    heads, prompt, head_dim = whole.shape
    start = torch.arange(heads, device=whole.device)[:, None] * prompt
    at = (kept.indices + start).flatten()
    tensor = whole.reshape(-1, head_dim)[at].view(len(forms), -1, head_dim)
    for row, both in kept.merged.items():
        instead = both[0 if role == "keys" else 1]
        tensor[row, : len(instead)] = instead
    counts = kept.counts.flatten()
    for form in dict.fromkeys(forms):
        mine = [row for row, other in enumerate(forms) if other == form]
        if len(mine) == len(forms):
            tensor = form.roundtrip(tensor, counts, role)
            break
        some = torch.tensor(mine, device=whole.device)
        tensor[some] = form.roundtrip(tensor[some], counts[some], role)
    by_policy: Tensor = tensor.unflatten(0, (-1, heads))
    return by_policy


def compress_together(
    policies: Sequence[Policy], layer: int, budgets: Sequence[Sequence[int]], signals: Signals
) -> Compressed:
    """One layer under several policies, ``[B, H, ...]``; ``budgets`` ``[B][H]`` are as planned."""
    rows = [policy.heads[layer] for policy in policies]
    final = [
        policy.split(layer, list(planned), signals)
        for policy, planned in zip(policies, budgets, strict=True)
    ]
    return store(rows, select(rows, final, signals), signals)


def compress(policy: Policy, layer: int, budgets: Sequence[int], signals: Signals) -> Compressed:
    """One layer of one policy, ``[H, ...]``; changes nothing."""
    several = compress_together([policy], layer, [budgets], signals)
    return Compressed(
        several.keys[0], several.values[0], several.counts[0], several.footprint_bytes
    )


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
