"""What each head of a layer keeps of a prompt, and where the runtime puts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.kept import ask
from kvtune.policies.parts import HeadPart
from kvtune.policies.policy import Policy
from kvtune.policies.reader import Reader
from kvtune.policies.room import Room
from kvtune.policies.signals import Signals
from kvtune.policies.storage import held_bytes
from kvtune.runtime.cache.placing import place


@dataclass(frozen=True)
class Choice:
    """Of one layer and sequence, or of several prompts side by side.

    Args:
        kept: tokens of each head that go into pages, those in 16 bits first.
        exact: how many of each head's stay in 16 bits.
        newest: of these, how many settle when newer tokens come.
        merged: keys and values ``[n, D]`` of heads whose method stores others than the kept
            tokens' own.
        weights: of heads whose keys in pages are coded times them, ``[D]``.
        beside: parts of each head that pages cannot hold.
        readers: of heads that do not read all that they hold; None of others.
        held_bytes: of each head, as formats count them.
        rooms: of heads that go on evicting; None where a head only grows.
    """

    kept: list[Tensor]
    exact: list[int]
    newest: list[int]
    merged: Mapping[int, tuple[Tensor, Tensor]]
    weights: Mapping[int, Tensor]
    beside: list[list[HeadPart]]
    readers: list[Reader | None]
    held_bytes: list[int]
    rooms: list[Room | None]

    @property
    def heads(self) -> range:
        """Rows of the signals that were asked about: heads, of several prompts side by side."""
        return range(len(self.readers))


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
    parts = ask([options * prompts], [held * prompts], signals).parts
    head_dim = signals.keys.shape[-1]
    rows = list(zip(parts, options * prompts, held * prompts, strict=True))
    placed = [place(each, option, head_dim) for each, option, _ in rows]
    return Choice(
        kept=[head.tokens for head in placed],
        exact=[head.exact for head in placed],
        newest=[head.newest for head in placed],
        merged={row: head.merged for row, head in enumerate(placed) if head.merged is not None},
        weights={row: head.weights for row, head in enumerate(placed) if head.weights is not None},
        beside=[head.beside for head in placed],
        readers=[option.method.reader(budget) for _, option, budget in rows],
        held_bytes=[held_bytes(option, budget, each, head_dim) for each, option, budget in rows],
        rooms=rooms * prompts,
    )


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


def weights_of(choices: Sequence[Choice], like: Tensor) -> Tensor | None:
    """Weights ``[n, D]`` of the keys ``like`` of ``side_by_side``; ones where a head has none."""
    if not any(choice.weights for choice in choices):
        return None
    found, first = like.new_ones(len(like), like.shape[-1], dtype=torch.float32), 0
    for choice in choices:
        for head, weights in choice.weights.items():
            found[first + head] = weights
        first += len(choice.kept)
    return found


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; a padding of nothing would copy them."""
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [longest - tensor.shape[1] for tensor in tensors]
    pairs = zip(tensors, missing, strict=True)
    return torch.cat([F.pad(tensor, (0, 0, 0, n)) if n else tensor for tensor, n in pairs])
