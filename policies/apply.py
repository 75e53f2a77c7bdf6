"""The one driver of replay, live runs and the runtime: a policy applied to a layer's prompt.

    ask      every head's method, once for each choice that heads share
    store    what it names, gathered and passed through each head's formats
    account  the bytes, from what was really stored

Methods choose and formats store; here their choices meet the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.format import Format, Role
from kvtune.policies.method import Method
from kvtune.policies.option import Option
from kvtune.policies.parts import HeadPart, Part, PartPlan
from kvtune.policies.policy import Policy
from kvtune.policies.reader import Held, Reader
from kvtune.policies.signals import Signals

Rows = Sequence[Sequence[Option]]  # [B][H]
Budgets = Sequence[Sequence[int]]  # [B][H]


@dataclass(frozen=True)
class Compressed:
    """One layer's prompt as attention sees it, under one policy ``[H, ...]`` or several ``[B, H]``.

    A head's parts lie one behind the other.

    Args:
        keys: ``[..., H, n, D]``, read back from storage; of a row the first ``counts`` are real.
        values: ``[..., H, n, D]``.
        counts: ``[..., H]`` int64.
        footprint_bytes: what all heads hold, of each policy.
        log_weight: ``[..., H, n]`` float32, added to the logits; None where there is none.
        readers: rows, counted through ``[..., H]``, that do not read all that they hold.
        tokens: of each entry, ``[..., H, n]`` int64; given where there are readers.
        signals: of the layer's prompt; likewise.
        padded: whether some rows hold fewer than n, where that is known without asking the device.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    footprint_bytes: tuple[int, ...]
    log_weight: Tensor | None = None
    readers: Mapping[Reader, tuple[int, ...]] = field(default_factory=dict)
    tokens: Tensor | None = None
    signals: Signals | None = None
    padded: bool | None = None

    def visible(self, queries: Tensor) -> Tensor | None:
        """Entries that queries ``[..., H, G, C, D]`` attend to; None where that is all.

        Returns:
            ``[..., H, 1, 1 or C, n]`` bool.
        """
        visible = self._real()
        for reader, rows in self.readers.items():
            read = self._read(reader, torch.tensor(rows, device=self.keys.device), queries)
            visible = read if visible is None else visible & read
        return visible

    def _real(self) -> Tensor | None:
        """Entries that are no padding, ``[..., H, 1, 1, n]``; None where there is none."""
        if self.padded is False:
            return None
        place = torch.arange(self.keys.shape[-2], device=self.keys.device)
        real = place < self.counts[..., None]
        if self.padded is None and bool(real.all()):
            return None
        return real[..., None, None, :]

    def _read(self, reader: Reader, rows: Tensor, queries: Tensor) -> Tensor:
        lead, (held, head_dim) = self.keys.shape[:-2], self.keys.shape[-2:]
        group, count = queries.shape[-3:-1]
        asking = queries.expand(*lead, group, count, head_dim).reshape(-1, group, count, head_dim)
        flags = torch.ones(len(asking), count, held, dtype=torch.bool, device=rows.device)
        flags[rows] = reader.reads(self._held(rows), asking[rows].float())
        return flags.view(*lead, 1, count, held)

    def _held(self, rows: Tensor) -> Held:
        if self.tokens is None or self.signals is None:
            raise RuntimeError("a reader was given nothing to choose from")
        heads = self.counts.shape[-1]
        return Held(
            self.keys.flatten(0, -3)[rows].float(),
            self.counts.flatten()[rows],
            self.tokens.flatten(0, -2)[rows],
            rows % heads,
            rows // heads,
            self.signals,
            self.signals.prompt_tokens,
        )

    @property
    def weights(self) -> Tensor | None:
        """``log_weight`` as attention over ``[..., H, G, C, n]`` takes it."""
        return None if self.log_weight is None else self.log_weight[..., None, None, :]

    def of_policy(self, row: int) -> Compressed:
        """One policy's ``[H, ...]`` of several."""
        heads = self.counts.shape[-1]
        mine = range(row * heads, (row + 1) * heads)
        readers = {
            reader: tuple(r - mine.start for r in rows if r in mine)
            for reader, rows in self.readers.items()
        }
        return Compressed(
            self.keys[row],
            self.values[row],
            self.counts[row],
            self.footprint_bytes[row : row + 1],
            None if self.log_weight is None else self.log_weight[row],
            {reader: rows for reader, rows in readers.items() if rows},
            None if self.tokens is None else self.tokens[row],
            self.signals,
            self.padded,
        )


@dataclass(frozen=True)
class Kept:
    """What heads store of a layer's prompt, before any format.

    Args:
        parts: of every row, counted through ``[B, H]``.
        numbers: which of the layer's KV heads the H are.
    """

    parts: list[list[HeadPart]]
    numbers: tuple[int, ...]

    @property
    def heads(self) -> int:
        """H."""
        return len(self.numbers)

    @property
    def sizes(self) -> list[int]:
        """Entries of each row, all parts together."""
        return [sum(len(part.tokens) for part in row) for row in self.parts]

    @property
    def tokens(self) -> list[Tensor]:
        """Token indices of each row, one part behind the other; ``VIRTUAL`` where it is none."""
        return [
            row[0].tokens if len(row) == 1 else torch.cat([part.tokens for part in row])
            for row in self.parts
        ]


def ask(
    rows: Rows,
    budgets: Budgets,
    signals: Signals,
    *,
    heads: Sequence[int] | None = None,
    goes_on: bool = False,
) -> Kept:
    """Ask each head's method; heads and policies that share a choice ask once.

    Args:
        rows: options ``[B][H]``.
        budgets: ``[B][H]``.
        signals: of the whole layer.
        heads: which of the layer's KV heads these are; all unless given.
        goes_on: whether these heads evict on while tokens are generated. They then hold tokens as
            they are: what a merge makes of those that left is for a prompt that is trimmed once.
    """
    wanted = [
        (option.method, budget)
        for options, planned in zip(rows, budgets, strict=True)
        for option, budget in zip(options, planned, strict=True)
    ]
    chosen: dict[object, list[Part]] = {
        (method, budget): [Part(method.keep(signals, budget))]
        if goes_on
        else method.parts(signals, budget)
        for method, budget in dict.fromkeys(wanted)
    }
    numbers = tuple(range(len(rows[0])) if heads is None else heads)
    parts = [
        [part.of_head(numbers[at % len(numbers)]) for part in chosen[choice]]
        for at, choice in enumerate(wanted)
    ]
    return Kept(parts, numbers)


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
        counts = torch.tensor([len(part.tokens) for part in parts], device=signals.keys.device)
        indices = pad_sequence([part.tokens for part in parts], batch_first=True)
        numbers = [kept.numbers[row % kept.heads] for row in rows]
        heads = torch.tensor(numbers, device=indices.device)
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
        some = torch.tensor(mine, device=tensor.device)
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
    plain = all(part.balance is None and part.shared_by == 1 for part in parts)
    if plain:
        return None
    factors = torch.ones_like(tensor)
    for row, part in enumerate(parts):
        if part.balance is not None and role == "keys":
            factors[row] *= part.balance
        if part.shared_by > 1:
            length = tensor[row].norm(dim=-1, keepdim=True)
            factors[row] /= length.clamp_min(torch.finfo(tensor.dtype).tiny)
    return factors


def _side_by_side(
    slices: Sequence[_Slice], kept: Kept, signals: Signals
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, log-weights and counts of all rows, each row's parts one behind the other."""
    sizes = kept.sizes
    counts = torch.tensor(sizes, device=signals.keys.device)
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


def linked(
    signals: Signals, options: Iterable[Option], layers: int, prompt: Callable[[int], Signals]
) -> Signals:
    """A layer's signals with the keys and values of the layer that a method links to it, if any.

    Args:
        signals: of the layer.
        options: of its heads, under one policy or several.
        layers: L.
        prompt: gives any layer's signals.
    """
    for method in dict.fromkeys(option.method for option in options):
        other = method.linked_layer(signals.layer, layers)
        if other is not None and 0 <= other < layers:
            read = prompt(other)
            return replace(signals, linked=(read.keys, read.values))
    return signals


def apply_together(
    policies: Sequence[Policy], layer: int, budgets: Budgets, signals: Signals
) -> Compressed:
    """One layer under several policies, ``[B, H, ...]``; ``budgets`` ``[B][H]`` are as planned."""
    rows = [policy.heads[layer] for policy in policies]
    final = [
        policy.split(layer, list(planned), signals)
        for policy, planned in zip(policies, budgets, strict=True)
    ]
    return store(rows, final, ask(rows, final, signals), signals)


def apply(policy: Policy, layer: int, budgets: Sequence[int], signals: Signals) -> Compressed:
    """One layer of one policy, ``[H, ...]``; changes nothing."""
    return apply_together([policy], layer, [budgets], signals).of_policy(0)


def apply_options(options: Sequence[Option], budget: int, signals: Signals) -> Compressed:
    """Each option on every head of a layer, ``[O, H, ...]``, all with one budget."""
    heads = len(signals.keys)
    rows = [(option,) * heads for option in options]
    budgets = [(budget,) * heads] * len(options)
    return store(rows, budgets, ask(rows, budgets, signals), signals)


def apply_each(
    options: Sequence[Option], budget: int, signals: Signals
) -> Iterator[tuple[list[int], Compressed]]:
    """Each option on every head of a layer, in batches; which options a batch holds comes with it.

    Those whose methods only drop tokens, equally many on every head, are gathered and stored as
    whole tensors: their heads need not be told apart.
    """
    methods = dict.fromkeys(option.method for option in options)
    kept = {m: tokens for m in methods if (tokens := _dropped_to(m, budget, signals)) is not None}
    sizes = {tokens.shape[-1] for tokens in kept.values()}
    for size in sizes:
        mine = {m: tokens for m, tokens in kept.items() if tokens.shape[-1] == size}
        columns = [at for at, option in enumerate(options) if option.method in mine]
        yield columns, _gather_options([options[at] for at in columns], mine, signals)
    if others := [at for at, option in enumerate(options) if option.method not in kept]:
        yield others, apply_options([options[at] for at in others], budget, signals)


def _dropped_to(method: Method, budget: int, signals: Signals) -> Tensor | None:
    """The tokens ``[H, n]`` that a method keeps, where that is all it does; None otherwise."""
    parts = method.parts(signals, budget)
    if len(parts) != 1 or method.reader(budget) is not None:
        return None
    part = parts[0]
    changed = (part.keys, part.values, part.formats)
    plain = part.plan.is_plain and all(each is None for each in changed)
    return part.tokens if plain and part.tokens.shape[-1] else None


def _gather_options(
    options: Sequence[Option], kept: Mapping[Method, Tensor], signals: Signals
) -> Compressed:
    """Options of methods that only drop tokens, ``[O, H, n, D]``; each format stores once."""
    tokens = torch.stack(list(kept.values()))  # [M, H, n]
    lead, (size, head_dim) = tokens.shape[:2], (tokens.shape[-1], signals.keys.shape[-1])
    counts = torch.full((lead[0] * lead[1],), size, device=tokens.device)
    row_of = {method: row for row, method in enumerate(kept)}
    rows = [row_of[option.method] for option in options]
    prompt = signals.keys.shape[-2]
    first = torch.arange(lead[1], device=tokens.device)[:, None] * prompt
    places = (tokens + first).flatten()

    def stored(whole: Tensor, forms: Sequence[Format], role: Role) -> Tensor:
        plain = whole.flatten(0, 1).index_select(0, places).view(-1, size, head_dim)
        back = {
            form: form.roundtrip(plain, counts, role).float().unflatten(0, lead)
            for form in dict.fromkeys(forms)
        }
        return torch.stack([back[form][row] for form, row in zip(forms, rows, strict=True)])

    each = [
        PartPlan(size).stored_bytes((option.keys, option.values), head_dim) for option in options
    ]
    return Compressed(
        stored(signals.keys, [option.keys for option in options], "keys"),
        stored(signals.values, [option.values for option in options], "values"),
        torch.full((len(options), lead[1]), size, device=tokens.device),
        tuple(lead[1] * sum(both) for both in each),
        padded=False,
    )
