"""Which program attends to what: ragged heads cut into tiles that take about equally long.

Runs on the host in numpy, once when a prompt is stored and again as pages are added; the tiles are
plain numbers in device memory, so that a captured graph goes on with new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.blocks import FIRST_NUMBER
from kvtune.policies.page_formats import BF16_PAGE, PAGE, PAIR, TURNED

Ints = NDArray[np.int64]

FIELDS = 16
"""Numbers of a tile's record, of which the last are unused: one line of memory."""

TABLE_AHEAD = 3
"""Entries beyond a segment's last that the kernel may load, and does not use."""

PROCESSORS = 132  # of an H100
PROGRAMS = {"floats": 4 * PROCESSORS, "integers": 4 * PROCESSORS, "mixed": 6 * PROCESSORS}
"""Tiles wanted of a layer: about as many programs as run at once, or fewer where they keep the
memory busy. Measured on an H100, ``benchmarks/results/kernels-h100.json``."""

FEW_BITS_PROGRAMS = 8 * PROCESSORS
"""Of layers nearly all of whose tokens have three bits or fewer: they wait for arithmetic, not for
memory, and twice as many programs hide more of it (4 to 17 % of the time on an H200,
``benchmarks/results/formats-tune-h200.json``)."""

_FEW_CUTS = 8  # of a segment that none is taken from
LONGEST_TILE = 12.5
"""Time of a tile about at most, as multiples of 64 tokens of bf16, but where all pages are floats,
of which nothing was measured. Where a layer has more rows than programs run at once, one tile each
would leave much of the card idle at a launch's end: cut so, attention to a plan's int4 takes 9 %
less at 64 sequences of 32k and 4 % less at 127, and is as it was at 8 (an H200,
``benchmarks/results/tile-lengths-h200.json``)."""

_SMALLEST_TILE = 2  # blocks of 64 tokens: while one is worked on, another is on its way
_PAGE_COST = {
    16: 1.0, 9: 0.55, 8: 0.6, 7: 0.6, 6: 0.45, 5: 0.45, 4: 0.35, 3: 0.35, 2: 0.28, 1: 0.28,
    **dict.fromkeys(range(17, 32), 0.4),
}  # fmt: skip
"""Time of 64 tokens by format, bf16 as 1: bytes, and the work of unpacking them. Keys by token and
rows of signs were not measured; the former count as keys by channel, whose loop is about as long,
signs as a little more than others of two and three bits."""

_BLOCK_COST = {1: 0.28, 2: 0.3, 3: 0.45, 4: 0.4, 8: 0.6}
"""Time of 64 tokens in blocks of so many bits a number, bf16 pages as 1."""


@dataclass(frozen=True)
class Segments:
    """Runs of pages of one format; a row (a sequence's KV head) has one or more. All ``[n]``.

    Args:
        row: whose it is.
        pair: ``PageLayout.code``.
        table_at: its first entry in the page table.
        pages: how many it has or may grow to while these tiles are used.
        tokens: how many it has; -1 if that is to be looked up, because it grows.
        tables: first cells of tables by which its pages are read; None where none has any.
    """

    row: Ints
    pair: Ints
    table_at: Ints
    pages: Ints
    tokens: Ints
    tables: Ints | None = None

    @property
    def most(self) -> Ints:
        """Tokens that there are pages for."""
        return self.pages * page_tokens(self.pair)

    @property
    def blocks(self) -> Ints:
        """Runs of 64 tokens that there are pages for."""
        return -(-self.most // PAGE)

    @property
    def places(self) -> Ints:
        """Each one's first place, where the tokens of all lie one after another."""
        return self.most.cumsum() - self.most


@dataclass(frozen=True)
class Tiles:
    """What the attention kernel is launched over.

    Args:
        records: ``[n, 16]`` int32: row, pair, first table entry, tokens of the segment before it,
            tokens at most, segment, slot, slots of the row before it * 65536 + all of them; then,
            so that reading may begin at once, the segment's tokens and the first two pages' cells,
            or -1; its first place where logits are wanted; and the first cell of its tables.
        pairs: the pairs that occur.
    """

    records: NDArray[np.int32]
    pairs: tuple[int, ...]


def kind_of(pairs: Iterable[int]) -> str:
    """Whether a layer's pages are all floats, all unpacked from integers, or mixed."""
    kinds = {"floats" if {*_formats_of(pair)} <= {9, 16} else "integers" for pair in pairs}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _programs(segments: Segments) -> int:
    """Tiles wanted of a layer unless it is said."""
    few = _of_formats(segments.pair, _is_of_few_bits).all(0)
    if segments.most[few].sum() > 0.9 * segments.most.sum():
        return FEW_BITS_PROGRAMS
    kind = kind_of(segments.pair)
    if kind == "floats":
        return PROGRAMS[kind]
    work = float((block_costs(segments.pair) * segments.blocks).sum())
    return max(PROGRAMS[kind], round(work / LONGEST_TILE))


def page_tokens(pair: Ints) -> Ints:
    """Tokens of a page of each pair."""
    keys, values = _formats_of(pair)
    return np.where((keys == 16) & (values == 16), BF16_PAGE, PAGE)


def block_costs(pair: Ints) -> NDArray[np.float64]:
    """Time of 64 tokens of each pair, as multiples of those of bf16."""
    cost: NDArray[np.float64] = _of_formats(pair, _cost).mean(0)
    return cost


def _of_formats(pair: Ints, what: Callable[[int], float]) -> NDArray[np.float64]:
    """Something of each one's keys and values, ``[2, n]``."""
    codes, place = np.unique(np.stack(_formats_of(pair)), return_inverse=True)
    found = np.array([what(int(code)) for code in codes], np.float64)
    return found[place].reshape(2, -1)


def _cost(code: int) -> float:
    return _PAGE_COST[code] if code < FIRST_NUMBER else _BLOCK_COST[_block_bits(code)]


def _is_of_few_bits(code: int) -> bool:
    if code >= FIRST_NUMBER:
        return _block_bits(code) <= 3
    return code in (1, 2, 5, 6) or code > 16


def _block_bits(code: int) -> int:
    return code % 8 + 1


def _formats_of(pair: Any) -> tuple[Any, Any]:
    """Codes of keys and values, rotated or not: a rotation is a tile's, not a page's."""
    keys, values = pair // PAIR, pair % PAIR
    return keys - keys // TURNED % 2 * TURNED, values - values // TURNED % 2 * TURNED


def plan_tiles(segments: Segments, table: Ints, programs: int | None = None) -> Tiles:
    """Cut segments into tiles, the longest first.

    Args:
        segments: of one layer.
        table: ``[entries]``, each page's cell, where it is known.
        programs: tiles wanted; there will be about as many, and one a segment at least.
    """
    if programs is None:
        programs = _programs(segments)
    cost, blocks = block_costs(segments.pair), segments.blocks
    target = max(float((cost * blocks).sum()) / programs, 1e-9)
    finest = np.maximum(blocks // _SMALLEST_TILE, 1)
    cuts = np.minimum(_cuts(cost * blocks / target, programs), finest)
    segment = np.repeat(np.arange(len(cuts)), cuts)
    turn = np.arange(len(segment)) - np.repeat(cuts.cumsum() - cuts, cuts)
    begin = turn * blocks[segment] // cuts[segment]
    first, end = PAGE * begin, PAGE * ((turn + 1) * blocks[segment] // cuts[segment])
    most = np.minimum(end, segments.most[segment]) - first
    row = segments.row[segment]
    slot, before, count = _slots(row)
    each, tokens = page_tokens(segments.pair)[segment], segments.tokens[segment]
    at = segments.table_at[segment] + first // each
    listed = np.append(table, [0, 0])
    cell = np.where(tokens > first, listed[at], -1)
    second = np.where(tokens > first + each, listed[at + 1], -1)
    tables = np.zeros_like(row) if segments.tables is None else segments.tables[segment]
    columns = (
        row, segments.pair[segment], at, first, most, segment, slot,
        before * 65536 + count, tokens, cell, second, segments.places[segment] + first,
        tables,
    )  # fmt: skip
    records = np.zeros((len(row), FIELDS), np.int32)
    records[:, : len(columns)] = np.stack(columns, axis=1)
    longest_first = np.argsort(-cost[segment] * most, kind="stable")
    pairs = tuple(sorted({int(pair) for pair in segments.pair}, reverse=True))
    return Tiles(records[longest_first], pairs)


def _cuts(wanted: NDArray[np.float64], programs: int) -> Ints:
    """Whole numbers near these, one at least, whose sum is that of programs that run at once.

    Of rows alike some have a tile more than others: else either fewer programs run than could, or a
    few run when all others have ended. A tile becomes an eighth longer at most.
    """
    cuts = np.maximum(np.rint(wanted), 1).astype(np.int64)
    left = programs - int(cuts.sum())
    length = wanted / cuts
    if left > 0:
        cuts[np.argsort(-length, kind="stable")[:left]] += 1
    elif left < 0:
        many = np.flatnonzero(cuts > _FEW_CUTS)
        cuts[many[np.argsort(length[many], kind="stable")[:-left]]] -= 1
    return cuts


def _slots(row: Ints) -> tuple[Ints, Ints, Ints]:
    """A scratch slot a tile, a row's side by side; how many of its row come before, and all."""
    order = np.argsort(row, kind="stable")
    slot = np.empty_like(row)
    slot[order] = np.arange(len(row))
    counts = np.bincount(row)
    starts = counts.cumsum() - counts
    return slot, slot - starts[row], counts[row]
