"""What each head of a layer keeps of a prompt, and how it is to be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.compress import ask
from kvtune.policies.policy import Policy
from kvtune.policies.room import Room
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class Choice:
    """Of one layer and sequence.

    Args:
        kept: tokens of each head, ascending.
        merged: keys and values ``[n, D]`` of heads whose method stores others than the kept
            tokens' own.
        rooms: of heads that go on evicting; None where a head only grows.
    """

    kept: list[Tensor]
    merged: Mapping[int, tuple[Tensor, Tensor]]
    rooms: list[Room | None]


def choose(policy: Policy, planned: Sequence[int], signals: Signals, evicts: bool) -> Choice:
    """Ask a layer's methods, when its prompt has been read.

    Args:
        policy: for the model.
        planned: budgets ``[H]`` before the allocator has seen this layer.
        signals: of the layer; of several prompts side by side where it chooses head by head.
        evicts: whether methods that can go on evicting will.
    """
    options, tokens = policy.heads[signals.layer], signals.prompt_tokens
    prompts = len(signals.keys) // len(options)
    budgets = policy.split(signals.layer, list(planned), signals)
    rooms = [
        Room.of(option, budget, tokens) if evicts else None
        for option, budget in zip(options, budgets, strict=True)
    ]
    held = [room.prompt if room else budget for room, budget in zip(rooms, budgets, strict=True)]
    kept, merged = ask([options * prompts], [held * prompts], signals)
    return Choice(kept, merged, rooms * prompts)


def side_by_side(read: Sequence[Signals], choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, P, D]`` of all sequences' heads, merged where a method merges.

    Behind shorter prompts are zeros.
    """
    keys, values = _stacked([x.keys for x in read]), _stacked([x.values for x in read])
    first = 0
    for choice in choices:
        for head, merged in choice.merged.items():
            row, tokens = first + head, choice.kept[head]
            keys[row, tokens], values[row, tokens] = merged
        first += len(choice.kept)
    return keys, values


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; a padding of nothing would copy them."""
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [longest - tensor.shape[1] for tensor in tensors]
    pairs = zip(tensors, missing, strict=True)
    return torch.cat([F.pad(tensor, (0, 0, 0, n)) if n else tensor for tensor, n in pairs])
