"""Parts of a layer whose packed buffers one kernel reads where they lie: tables, and launching it.

What is undone to keys that are read back is done to their queries instead, in the opposite order,
and what is undone to values is done to their output: nothing is done to what is stored. Tables are
made once: where a sequence has ended, they are changed in place, so that a captured graph goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.encoded_pages import packed_pieces
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.packed import BUFFERS, STEP, Piece, Section
from kvtune.runtime.cache.encoded_pages import Buffer
from kvtune.runtime.kernels.tiles import PROCESSORS

if TYPE_CHECKING:
    from kvtune.runtime.cache.beside import LaidPart

_PROGRAMS = 8 * PROCESSORS
"""Tiles wanted of a layer at most: twice as many as run at once, as ``FEW_BITS_PROGRAMS``, since
packed buffers too wait for arithmetic. Reasoned: with this number, and with no other,
``benchmarks/results/packed-h200.json`` was measured."""

_MOST_STEPS = 32
"""Steps of a tile at most, of 32 tokens each, so that of a layer with very many tokens the last
tiles do not leave most processors idle for long. Reasoned as well, and in the same figures."""

_TOKENS = 5
"""Which number of a tile's record says how many tokens it has."""

_WIDTHS = ("alike", "channels", "tokens")


def _pieces(part: LaidPart, head_dim: int) -> tuple[Piece, ...] | None:
    """How a kernel reads a part's tokens; None where none does."""
    return packed_pieces(part.part.formats, part.laid.tokens[0], head_dim)


@dataclass(frozen=True)
class _Tile:
    """What one program attends to; see ``attend_packed``."""

    row: int
    sections: tuple[int, int]
    firsts: tuple[int, int]
    tokens: int
    log_weight: int
    turned: bool

    def record(self, slot: int) -> tuple[int, ...]:
        """What the kernel is told of it, which leaves its output in this slot."""
        return (self.row, *self.sections, *self.firsts, self.tokens, slot, self.log_weight)


class PackedRows:
    """Parts of different rows of a layer, one a row.

    Args:
        parts: all of which a kernel reads.
        head_dim: D.
        device: where the pool is.
    """

    def __init__(self, parts: Sequence[LaidPart], head_dim: int, device: torch.device) -> None:
        self.head_dim = head_dim
        held = [each.part for each in parts]
        self.rows = torch.tensor([each.row for each in held], device=device)
        self._balance = _stacked([each.balance for each in held], 1.0)
        eye = torch.eye(head_dim)
        turns = [(None, None) if each.turns is None else each.turns for each in held]
        self._turns = [_stacked([pair[n] for pair in turns], eye) for n in (0, 1)]
        weights = [
            torch.zeros(each.laid.tokens[0]) if each.part.log_weight is None
            else each.part.log_weight
            for each in parts
        ]  # fmt: skip
        weighted = any(each.log_weight is not None for each in held)
        self._log_weights = torch.cat([x.float().to(device) for x in weights]) if weighted else None
        self._table(parts, device)

    def free(self, rows: range) -> None:
        """Let programs of these rows of the layer, which have ended, read nothing from now on."""
        gone = (self.rows >= rows.start) & (self.rows < rows.stop)
        for _, tiles in self._launches:
            number = tiles[:, 0].long() % len(gone)
            tiles[:, _TOKENS].masked_fill_(gone[number], 0)

    def _table(self, parts: Sequence[LaidPart], device: torch.device) -> None:
        """Sections, tiles and pages, as the kernel reads them."""
        records: list[list[int]] = []
        tiles: dict[tuple[int, int], list[_Tile]] = defaultdict(list)
        total = sum(each.laid.tokens[0] for each in parts)
        step = STEP * min(max(-(-total // (_PROGRAMS * STEP)), 2), _MOST_STEPS)
        table_at = weights_at = 0
        for row, each in enumerate(parts):
            for piece in _pieces(each, self.head_dim) or ():
                both = (piece.keys, piece.values)
                own = [each.laid.buffers_of(n) for n in (0, 1)]
                records += [_record(x, y, table_at) for x, y in zip(both, own, strict=True)]
                codes = tuple(_number(x, y) for x, y in zip(both, own, strict=True))
                at = (len(records) - 2, len(records) - 1)
                tiles[codes] += _cut(piece, at, (row, len(parts)), step, weights_at)  # type: ignore[index]
            table_at, weights_at = table_at + len(each.laid.pages), weights_at + each.laid.tokens[0]
        pages = np.concatenate([each.laid.pages for each in parts])
        self._pages = torch.tensor(pages, dtype=torch.int32, device=device)
        self._sections = torch.tensor(records, dtype=torch.int32, device=device)
        self._slots(tiles, len(parts), device)

    def _slots(
        self, tiles: dict[tuple[int, int], list[_Tile]], rows: int, device: torch.device
    ) -> None:
        """A slot a tile, those of a row side by side."""
        counts, turned = np.zeros(rows, np.int64), defaultdict[int, list[bool]](list)
        for each in (tile for some in tiles.values() for tile in some):
            counts[each.row % rows] += 1
            turned[each.row % rows].append(each.turned)
        self._most = int(counts.max())
        flags = np.zeros((rows, self._most), bool)
        for number, mine in turned.items():
            flags[number, : len(mine)] = mine
        self._turned = torch.tensor(flags[..., None, None], device=device) if flags.any() else None
        self._turns_queries = any(x.row >= rows for some in tiles.values() for x in some)
        filled = np.zeros(rows, np.int64)
        self._launches = []
        for codes, some in tiles.items():
            listed = []
            for tile in some:
                row = tile.row % rows
                listed.append(tile.record(int(row * self._most + filled[row])))
                filled[row] += 1
            self._launches.append((codes, torch.tensor(listed, dtype=torch.int32, device=device)))

    def attend(self, q: Tensor, memory: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output ``[R, G, D]`` float32 and log-sum-exp ``[R, G]`` of these rows.

        Args:
            q: ``[rows, G, D]``, of all of the layer's.
            memory: the pool's.
            scale: multiplies the logits.
        """
        from kvtune.runtime.kernels.packed import attend_packed

        queries = self._queries(q)
        group, count = q.shape[1], len(self.rows) * self._most
        out = queries.new_zeros(count, group, self.head_dim)
        lse = queries.new_full((count, group), -torch.inf)
        for (keys, values), tiles in self._launches:
            attend_packed[(len(tiles),)](
                queries, memory, self._pages, self._sections, tiles,
                lse if self._log_weights is None else self._log_weights, out, lse, scale,
                D=self.head_dim, G=group, M=max(16, 1 << (group - 1).bit_length()),
                KEYS=keys, VALUES=values, WEIGHTED=self._log_weights is not None, num_warps=4,
            )  # fmt: skip
        return self._merged(out.unflatten(0, (-1, self._most)), lse.unflatten(0, (-1, self._most)))

    def _queries(self, q: Tensor) -> Tensor:
        """As stored keys are read, and behind them the same times a Hadamard matrix."""
        mine = q[self.rows].float()
        if self._balance is not None:
            mine = mine / self._balance[:, None]
        if self._turns[0] is not None:
            mine = mine @ self._turns[0]
        return torch.cat([mine, hadamard(mine)]) if self._turns_queries else mine.contiguous()

    def _merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """One output a row of those of its tiles, ``[R, tiles, G, D]`` and ``[R, tiles, G]``.

        A row that has ended has none: its output is zero, and its log-sum-exp the least number.
        """
        total = lse.logsumexp(1).clamp_min(torch.finfo(lse.dtype).min)
        weighted = out * (lse - total[:, None]).exp()[..., None]
        if self._turned is None:
            output = weighted.sum(1)
        else:
            output = weighted.where(~self._turned, 0).sum(1)
            output = output + hadamard(weighted.where(self._turned, 0).sum(1))
        if self._turns[1] is not None:
            output = output @ self._turns[1].mT
        return output, total


def packed_rows(
    parts: Sequence[LaidPart], head_dim: int, device: torch.device
) -> tuple[list[PackedRows], list[LaidPart]]:
    """Those that a kernel reads, the first of each row together, then the second; and the rest.

    Args:
        parts: none of which is without tokens.
        head_dim: D.
        device: where the pool is.
    """
    is_read = [_pieces(each, head_dim) is not None for each in parts]
    turns: list[list[LaidPart]] = []
    seen: dict[int, int] = defaultdict(int)
    for each in compress(parts, is_read):
        number = seen[each.part.row]
        seen[each.part.row] += 1
        turns += [[]] * (number == len(turns))
        turns[number] = [*turns[number], each]
    rest = [each for each, read in zip(parts, is_read, strict=True) if not read]
    return [PackedRows(some, head_dim, device) for some in turns], rest


def _stacked(each: Sequence[Tensor | None], other: Tensor | float) -> Tensor | None:
    """What each of ``R`` rows has, ``[R, ...]`` float32, and ``other`` where a row has none.

    None where no row has any: then nothing is to be done to queries or output.
    """
    some = next((x for x in each if x is not None), None)
    if some is None:
        return None
    plain = torch.as_tensor(other, device=some.device).expand_as(some)
    return torch.stack([(plain if x is None else x).float() for x in each])


def _cut(
    piece: Piece, sections: tuple[int, int], rows: tuple[int, int], step: int, weights_at: int
) -> Iterator[_Tile]:
    """Tiles of at most ``step`` tokens; ``rows`` is the row's number and how many there are."""
    row, count = rows
    for start in range(piece.start, piece.stop, step):
        firsts = start - piece.keys.start, start - piece.values.start
        query = row + count * piece.keys.turned
        tokens = min(step, piece.stop - start)
        yield _Tile(query, sections, firsts, tokens, weights_at + start, piece.values.turned)


def _record(section: Section, buffers: Mapping[str, Buffer], table_at: int) -> list[int]:
    """A section's record; see ``packed_numbers``."""
    own = {name: buffers[mine] for name, mine in section.buffers.items()}
    at = [own[name].start if name in own else 0 for name in BUFFERS]
    bits = section.reading.bits
    wide = own["widths"].shape[0] if section.reading.widths == "channels" else 0
    return [
        *at, section.group, section.row_groups, section.group_bytes(bits),
        section.group_bytes(2 * bits), wide, section.first, table_at,
    ]  # fmt: skip


def _number(section: Section, buffers: Mapping[str, Buffer]) -> int:
    """What a kernel is compiled for; see ``packed_numbers``."""
    reading = section.reading
    bfloat = buffers[section.buffers["codes"]].dtype == torch.bfloat16
    return (
        reading.bits + 32 * (reading.rows == "channels") + 64 * _WIDTHS.index(reading.widths)
        + 256 * reading.levels + 512 * reading.patched + 1024 * reading.rank
        + 32768 * (reading.groups.bit_length() - 1) + 524288 * bfloat
        + 1048576 * reading.words
    )  # fmt: skip
