"""What formats' own pages cannot hold: weighted entries, packed buffers, shared directions.

Entries in 16 bits, such as RazorAttention's compensation token, lie in one dense tensor a layer, so
that a step attends to them in a few operations. All others stay encoded, in pages of their own
(``encoded_pages``) unless two layers share them. They are read in place by a kernel
(``packed_parts``), or back at every step where none reads their format: the memory is then saved
and the time is not. Their attention is joined to that over pages by its log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.attention import attend, merge
from kvtune.policies.format import Format, Role, Stored
from kvtune.policies.option import Option
from kvtune.policies.parts import HeadPart
from kvtune.policies.placement import EXACT
from kvtune.runtime.cache.encoded_pages import Laid, lay
from kvtune.runtime.cache.packed_parts import PackedRows, packed_rows
from kvtune.runtime.cache.pool import PageMemory

Shared = dict[tuple[int, int, int], "Encoded"]
"""Directions that two layers share, by sequence, KV head and the first of the two layers."""


@dataclass(frozen=True)
class Encoded:
    """The buffers of one head's part, of which both keys and values are stored."""

    keys: Stored
    values: Stored


@dataclass(frozen=True)
class HeldPart:
    """One head's part as it is held.

    Args:
        row: of the layer.
        encoded: buffers; of a shared part, the directions.
        formats: of keys and of values.
        log_weight: ``[n]`` float32, or None.
        balance: ``[D]``, or None: keys read back are divided by it.
        lengths: of a shared part's keys and values, ``[2, n]``; else None.
        turns: ``[D, D]`` each, or None: keys and values read back are multiplied by the transposes.
    """

    row: int
    encoded: Encoded
    formats: tuple[Format, Format]
    log_weight: Tensor | None = None
    balance: Tensor | None = None
    lengths: Tensor | None = None
    turns: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(
        row: int, part: HeadPart, own: tuple[Tensor, Tensor], option: Option,
        shared: tuple[Shared, tuple[int, int, int]] | None = None,
    ) -> HeldPart:  # fmt: skip
        """Encode one part.

        Args:
            row: of the layer.
            part: what to hold.
            own: keys and values ``[P, D]`` of the head's prompt.
            option: says the formats unless the part does.
            shared: directions that are stored already, and under which name this part's are.
        """
        formats = part.formats or (option.keys, option.values)
        keys, values = (
            whole[part.tokens] if given is None else given
            for whole, given in zip(own, (part.keys, part.values), strict=True)
        )
        if part.balance is not None:
            keys = keys * part.balance
        if part.turns is not None:
            keys, values = (
                x.float() @ turn for x, turn in zip((keys, values), part.turns, strict=True)
            )
        lengths = None
        if shared is not None:
            lengths = torch.stack([keys.norm(dim=-1), values.norm(dim=-1)]).half()
            keys, values = F.normalize(keys, dim=-1), F.normalize(values, dim=-1)
        found = shared[0].get(shared[1]) if shared is not None else None
        if found is None:
            found = Encoded(formats[0].encode(keys, "keys"), formats[1].encode(values, "values"))
            if shared is not None:
                shared[0][shared[1]] = found
        return HeldPart(row, found, formats, part.log_weight, part.balance, lengths, part.turns)

    @property
    def is_dense(self) -> bool:
        """Whether it lies in 16 bits, by itself."""
        return self.formats == EXACT and self.lengths is None

    @property
    def buffers(self) -> tuple[Stored, Stored]:
        """The buffers of the keys, then those of the values."""
        return self.encoded.keys, self.encoded.values

    def restored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What was done to keys and values ``[n, D]`` before they were encoded, undone."""
        if self.turns is not None:
            keys, values = keys @ self.turns[0].T, values @ self.turns[1].T
        if self.balance is not None:
            keys = keys / self.balance
        if self.lengths is not None:
            keys, values = keys * self.lengths[0, :, None], values * self.lengths[1, :, None]
        return keys, values


@dataclass(frozen=True)
class LaidPart:
    """One head's part whose packed buffers lie in the pool's pages.

    Args:
        part: without its buffers.
        laid: where they are.
    """

    part: HeldPart
    laid: Laid

    @staticmethod
    def of(part: HeldPart, pool: PageMemory, head_dim: int) -> LaidPart:
        """Move a part's buffers into pages."""
        both = part.encoded.keys, part.encoded.values
        none = Encoded(*(Stored({}, each.tokens) for each in both))
        return LaidPart(replace(part, encoded=none), lay(pool, head_dim, both))

    def fetched(self, pool: PageMemory) -> HeldPart:
        """The part with its buffers."""
        return replace(self.part, encoded=Encoded(*self.laid.read(pool)))


class Beside:
    """One layer's parts that lie in no pages of their format's own, and attention over them.

    Their packed buffers are read in place, where a kernel reads them, or back.
    """

    def __init__(
        self,
        held: Sequence[HeldPart],
        laid: Sequence[LaidPart],
        head_dim: int,
        pool: PageMemory,
        in_place: bool = False,
    ) -> None:
        """Lay out what is held: 16-bit parts in one tensor, others as they are.

        Args:
            held: parts of the layer's rows.
            laid: those whose buffers are in pages.
            head_dim: D.
            pool: that these are in.
            in_place: whether kernels read there what they can; the rest is read back.
        """
        self.head_dim, self.device, self.pool = head_dim, pool.memory.device, pool
        dense = [each for each in held if each.is_dense]
        self.encoded = [each for each in held if not each.is_dense]
        self.laid = list(laid)
        self._packed: list[PackedRows] = []
        self._read_back = [each for each in laid if each.laid.tokens[0]]
        if in_place:
            self._packed, self._read_back = packed_rows(self._read_back, head_dim, self.device)
        self.dense = stacked(dense, head_dim, torch.bfloat16, self.device) if dense else None

    @property
    def is_dense(self) -> bool:
        """Whether a step asks nothing of the host."""
        return not self.encoded and not self._read_back

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages of packed buffers."""
        return sum(len(x.laid.pages) * x.laid.layout.page_bytes for x in self.laid)

    def free(self, rows: range) -> None:
        """Give back these rows' pages of packed buffers, and forget what lies beside them.

        What a captured graph reads is changed in place: tables of packed rows, whose pages may hold
        other sequences' bytes from now on, and dense parts, of which what is left weighs nothing.
        """
        for each in self.laid:
            if each.part.row in rows:
                each.laid.give(self.pool)
        self.laid, self._read_back = (
            [each for each in some if each.part.row not in rows]
            for some in (self.laid, self._read_back)
        )
        for packed in self._packed:
            packed.free(rows)
        self.encoded = [each for each in self.encoded if each.row not in rows]
        if self.dense is not None:
            number, _, values, weights = self.dense
            gone = ((number >= rows.start) & (number < rows.stop))[:, None, None]
            values.masked_fill_(gone, 0)
            weights.masked_fill_(gone, torch.finfo(weights.dtype).min)

    def merged(self, q: Tensor, output: Tensor, lse: Tensor, scale: float) -> Tensor:
        """Attention over pages and over these parts together, ``[rows, G, D]`` like ``output``.

        Args:
            q: ``[rows, G, D]``.
            output: over the pages.
            lse: its log-sum-exp, ``[rows, G]`` float32.
            scale: multiplies the logits.
        """
        parts = [self.dense] if self.dense is not None else []
        if not self.is_dense:
            fetched = [each.fetched(self.pool) for each in self._read_back]
            parts.append(stacked(self.encoded + fetched, self.head_dim, torch.float32, self.device))
        found = [
            (rows, attend(q[rows].float(), keys.float(), values.float(), None, scale, weight))
            for rows, keys, values, weight in parts
        ]
        memory = self.pool.memory
        found += [(each.rows, each.attend(q, memory, scale)) for each in self._packed]
        return joined(found, output, lse)[0].to(q.dtype)


def joined(
    found: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]], output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over several parts of some rows' caches as one, in float32, and its log-sum-exp.

    Args:
        found: numbers of rows ``[R]``, and their output ``[R, G, D]`` and log-sum-exp ``[R, G]``.
        output: of all rows over another part, ``[rows, G, D]``.
        lse: its log-sum-exp, ``[rows, G]`` float32.
    """
    output = output.float()
    for rows, ours in found:
        together = torch.logaddexp(lse[rows], ours[1])
        output = output.index_copy(0, rows, merge((output[rows], lse[rows]), ours))
        lse = lse.index_copy(0, rows, together)
    return output, lse


def read_back(held: Sequence[HeldPart], head_dim: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[n, D]`` float32 of each part.

    Parts whose buffers are alike are decoded together, in the operations of one: a step's time is
    its operations, not its bytes.
    """
    together: dict[Any, list[int]] = {}
    for number, each in enumerate(held):
        vary = any(form.bytes_vary for form in each.formats)
        shapes = [
            (name, x.shape, x.dtype) for part in each.buffers for name, x in part.buffers.items()
        ]
        counts = (part.tokens for part in each.buffers)
        alike = number if vary else (each.formats, *counts, *shapes)
        together.setdefault(alike, []).append(number)
    found = dict[int, tuple[Tensor, Tensor]]()
    for numbers in together.values():
        parts = [held[number] for number in numbers]
        both = zip(*(_decoded(parts, role, head_dim) for role in (0, 1)), strict=True)
        for number, part, pair in zip(numbers, parts, both, strict=True):
            found[number] = part.restored(*pair)
    return [found[number] for number in range(len(held))]


_ROLES: tuple[Role, Role] = ("keys", "values")


def _decoded(parts: Sequence[HeldPart], role: int, head_dim: int) -> Sequence[Tensor]:
    """Keys (0) or values (1) of parts whose buffers are alike, ``[n, D]`` each."""
    form, stored = parts[0].formats[role], [part.buffers[role] for part in parts]
    if len(parts) == 1:
        return [form.decode(stored[0], head_dim, _ROLES[role])]
    tokens = stored[0].tokens
    buffers = {
        name: torch.stack([each.buffers[name] for each in stored]) for name in stored[0].buffers
    }

    def decode(own: dict[str, Tensor]) -> Tensor:
        return form.decode(Stored(own, tokens), head_dim, _ROLES[role])

    return list(torch.vmap(decode)(buffers))


def stacked(
    held: Sequence[HeldPart], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``[R]``, keys and values ``[R, n, D]``, and log-weights ``[R, 1, n]``; several parts of
    a row lie one behind the other, and what pads the shorter rows weighs nothing."""
    by_row: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for each, (keys, values) in zip(held, read_back(held, head_dim), strict=True):
        none = torch.zeros(len(keys), device=device)
        weight = none if each.log_weight is None else each.log_weight
        by_row.setdefault(each.row, []).append((keys.to(dtype), values.to(dtype), weight))
    joined = [[torch.cat(x) for x in zip(*parts, strict=True)] for parts in by_row.values()]
    keys, values = (pad_sequence([x[n] for x in joined], batch_first=True) for n in (0, 1))
    weights = pad_sequence([x[2] for x in joined], True, -torch.inf)
    rows = torch.tensor(list(by_row), device=device)
    return rows, keys, values, weights[:, None]
