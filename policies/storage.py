"""Parts pass through their formats and lie side by side; bytes are counted from what was stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.compressed import Compressed, on_device
from kvtune.policies.format import Format, Role
from kvtune.policies.kept import Budgets, Kept, Rows
from kvtune.policies.option import Option
from kvtune.policies.parts import HeadPart
from kvtune.policies.reader import Reader
from kvtune.policies.signals import Signals


def store(rows: Rows, budgets: Budgets, kept: Kept, signals: Signals) -> Compressed:
    """Gather what stays, pass it through formats, and lay each head's parts side by side."""
    options = [option for row in rows for option in row]
    depth = max((len(row) for row in kept.parts), default=1)
    slices = [_Slice.of(kept, options, number, signals) for number in range(depth)]
    keys, values, weights, counts = _side_by_side(slices, kept, signals)
    split = (-1, kept.heads)
    flat_budgets = [budget for row in budgets for budget in row]
    readers = _readers(options, flat_budgets)
    tokens = pad_sequence(kept.tokens, batch_first=True) if readers else None
    return Compressed(
        keys.unflatten(0, split),
        values.unflatten(0, split),
        counts.unflatten(0, split),
        _bytes(options, flat_budgets, kept, signals),
        None if weights is None else weights.unflatten(0, split),
        readers,
        None if tokens is None else tokens.unflatten(0, split),
        signals if readers else None,
        padded=len(set(kept.sizes)) > 1,
    )


@dataclass(frozen=True)
class _Slice:
    """The parts of one number of all rows that have so many, read back from their formats."""

    rows: list[int]
    keys: Tensor  # [R, n, D]
    values: Tensor
    parts: list[HeadPart]

    @staticmethod
    def of(kept: Kept, options: Sequence[Option], number: int, signals: Signals) -> _Slice:
        rows = [row for row, parts in enumerate(kept.parts) if len(parts) > number]
        parts = [kept.parts[row][number] for row in rows]
        counts = on_device([len(part.tokens) for part in parts], signals.keys.device)
        indices = pad_sequence([part.tokens for part in parts], batch_first=True)
        numbers = [kept.numbers[row % kept.heads] for row in rows]
        heads = on_device(numbers, indices.device)
        both = []
        roles: tuple[tuple[Role, Tensor], ...] = (
            ("keys", signals.keys),
            ("values", signals.values),
        )
        for role, whole in roles:
            tensor = _gathered(whole, indices, heads, [getattr(part, role) for part in parts])
            both.append(_stored(tensor, counts, parts, [options[row] for row in rows], role))
        return _Slice(rows, both[0], both[1], parts)


def _gathered(
    whole: Tensor, indices: Tensor, heads: Tensor, instead: Sequence[Tensor | None]
) -> Tensor:
    """Each row's tokens of ``[H, P, D]``, or what a part gives instead: ``[R, n, D]``."""
    prompt, head_dim = whole.shape[1:]
    at = (indices.clamp_min(0) + heads[:, None] * prompt).flatten()
    tensor = whole.reshape(-1, head_dim)[at].view(len(indices), -1, head_dim)
    for row, given in enumerate(instead):
        if given is not None:
            tensor[row, : len(given)] = given
    return tensor


def _stored(
    tensor: Tensor, counts: Tensor, parts: Sequence[HeadPart], options: Sequence[Option], role: Role
) -> Tensor:
    """Each row through its own format, all rows of a format at once."""
    forms = [_format(part, option, role) for part, option in zip(parts, options, strict=True)]
    factor = _factors(tensor, parts, role)
    if factor is not None:
        tensor = tensor * factor
    turns = {row: turn for row, part in enumerate(parts) if (turn := part.turn(role)) is not None}
    if turns:
        tensor = _turned(tensor, turns)
    for form in dict.fromkeys(forms):
        mine = [row for row, other in enumerate(forms) if other == form]
        if len(mine) == len(forms):
            tensor = form.roundtrip(tensor, counts, role)
            break
        some = on_device(mine, tensor.device)
        tensor[some] = form.roundtrip(tensor[some], counts[some], role)
    if turns:
        tensor = _turned(tensor, {row: turn.T for row, turn in turns.items()})
    return tensor if factor is None else tensor / factor


def _turned(tensor: Tensor, turns: Mapping[int, Tensor]) -> Tensor:
    """Rows of ``[R, n, D]`` times their matrices."""
    tensor = tensor.clone()
    for row, turn in turns.items():
        tensor[row] = (tensor[row].float() @ turn.float()).to(tensor.dtype)
    return tensor


def _format(part: HeadPart, option: Option, role: Role) -> Format:
    keys, values = part.formats or (option.keys, option.values)
    return keys if role == "keys" else values


def _factors(tensor: Tensor, parts: Sequence[HeadPart], role: Role) -> Tensor | None:
    """What rows are multiplied with before they are stored, ``[R, n, D]``; None where nothing.

    Keys are balanced channel by channel, and what layers share is stored as directions.
    """
    if role == "keys" and any(part.balance is not None for part in parts):
        one = tensor.new_ones(tensor.shape[-1])
        balances = [one if part.balance is None else part.balance.to(one.dtype) for part in parts]
        factors = torch.stack(balances)[:, None]
    elif all(part.shared_by == 1 for part in parts):
        return None
    else:
        factors = tensor.new_ones(len(parts), 1, 1)
    if all(part.shared_by == 1 for part in parts):
        return factors
    factors = factors.expand_as(tensor).clone()
    for row, part in enumerate(parts):
        if part.shared_by > 1:
            length = tensor[row].norm(dim=-1, keepdim=True)
            factors[row] /= length.clamp_min(torch.finfo(tensor.dtype).tiny)
    return factors


def _side_by_side(
    slices: Sequence[_Slice], kept: Kept, signals: Signals
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, log-weights and counts of all rows, each row's parts one behind the other."""
    sizes = kept.sizes
    counts = on_device(sizes, signals.keys.device)
    weights = _log_weights(kept, max(sizes), signals.keys.device)
    if len(slices) == 1:
        return slices[0].keys, slices[0].values, weights, counts
    shape = len(sizes), max(sizes), signals.keys.shape[-1]
    keys, values = signals.keys.new_zeros(shape), signals.values.new_zeros(shape)
    ends = [0] * len(sizes)
    for each in slices:
        for at, (row, part) in enumerate(zip(each.rows, each.parts, strict=True)):
            mine = slice(ends[row], ends[row] + len(part.tokens))
            keys[row, mine] = each.keys[at, : len(part.tokens)]
            values[row, mine] = each.values[at, : len(part.tokens)]
            ends[row] = mine.stop
    return keys, values, weights, counts


def _log_weights(kept: Kept, longest: int, device: torch.device) -> Tensor | None:
    if all(part.log_weight is None for row in kept.parts for part in row):
        return None
    weights = torch.zeros(len(kept.parts), longest, device=device)
    for at, row in enumerate(kept.parts):
        end = 0
        for part in row:
            if part.log_weight is not None:
                weights[at, end : end + len(part.tokens)] = part.log_weight
            end += len(part.tokens)
    return weights


def _bytes(
    options: Sequence[Option], budgets: Sequence[int], kept: Kept, signals: Signals
) -> tuple[int, ...]:
    """What each policy's heads hold, counted from the parts that were stored."""
    head_dim = signals.keys.shape[-1]
    each = [
        held_bytes(option, budget, parts, head_dim)
        for option, budget, parts in zip(options, budgets, kept.parts, strict=True)
    ]
    return tuple(sum(each[at : at + kept.heads]) for at in range(0, len(each), kept.heads))


def held_bytes(option: Option, budget: int, parts: Sequence[HeadPart], head_dim: int) -> int:
    """What one head holds on the device, counted from its parts."""
    default = option.keys, option.values
    stored = (
        0
        if option.on_host
        else sum(sum(part.plan.stored_bytes(default, head_dim)) for part in parts)
    )
    reader, entries = option.method.reader(budget), sum(len(part.tokens) for part in parts)
    if reader is None or (option.on_host and reader.compared_on_host(entries)):
        return stored
    return stored + reader.index_bytes(entries, head_dim)


def _readers(options: Sequence[Option], budgets: Sequence[int]) -> dict[Reader, tuple[int, ...]]:
    found: dict[Reader, list[int]] = {}
    for row, (option, budget) in enumerate(zip(options, budgets, strict=True)):
        if (reader := option.method.reader(budget)) is not None:
            found.setdefault(reader, []).append(row)
    return {reader: tuple(rows) for reader, rows in found.items()}
