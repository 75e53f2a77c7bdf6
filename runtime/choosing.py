"""What each head of a layer keeps of a prompt, and how it is to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvtune.policies.compress import select
from kvtune.policies.policy import Policy
from kvtune.policies.room import Room
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class Choice:
    """Of one layer and sequence.

    Args:
        keys: ``[H, P, D]``; where a method merges, its kept tokens' are the merged ones.
        values: likewise.
        kept: tokens of each head, ascending.
        rooms: of heads that go on evicting; None where a head only grows.
    """

    keys: Tensor
    values: Tensor
    kept: list[Tensor]
    rooms: list[Room | None]


def choose(policy: Policy, planned: Sequence[int], signals: Signals, evicts: bool) -> Choice:
    """Ask a layer's methods, when its prompt has been read.

    Args:
        policy: for the model.
        planned: budgets ``[H]`` before the allocator has seen this layer.
        signals: of the layer.
        evicts: whether methods that can go on evicting will.
    """
    options, tokens = policy.heads[signals.layer], signals.prompt_tokens
    budgets = policy.split(signals.layer, list(planned), signals)
    rooms = [
        Room.of(option, budget, tokens) if evicts else None
        for option, budget in zip(options, budgets, strict=True)
    ]
    held = [room.prompt if room else budget for room, budget in zip(rooms, budgets, strict=True)]
    chosen = select([options], [held], signals)
    kept = [row[:n] for row, n in zip(chosen.indices[0], chosen.sizes[0], strict=True)]
    keys, values = signals.keys.contiguous(), signals.values.contiguous()
    if chosen.merged:
        keys, values = keys.clone(), values.clone()
    for head, both in chosen.merged.items():
        keys[head, kept[head]], values[head, kept[head]] = both
    return Choice(keys, values, kept, rooms)
