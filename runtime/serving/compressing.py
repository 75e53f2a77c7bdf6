"""What a plan makes of a step's prompts: tokens are chosen, and written into requests' pages.

All heads of all prompts and of many layers lie in one table: places and records are made of it in
one pass of the host, and all pages of a layout are written by one launch. Methods score prompts
piece by piece; heads of all methods, budgets and lengths are then ranked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.policies import ragged
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.parts import Part
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend, Writing
from kvtune.runtime.cache.fitted_pages import Fitted
from kvtune.runtime.cache.segments import CODED, Ints
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.storing import fp8_scales
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Stored
from kvtune.runtime.serving.laying import Laid, lay_out
from kvtune.runtime.serving.reading import Asked, Prompts


@dataclass(frozen=True)
class Rows:
    """The heads that methods are shown, piece after piece, and what each may keep.

    Args:
        heads: in the table of all prompts' heads.
        methods: number of each one's method.
        budgets: tokens of each.
        prompts: whose they are.
        ends: of each piece, where its rows end.
    """

    heads: Ints
    methods: Ints
    budgets: Ints
    prompts: Ints
    ends: Ints

    def piece(self, number: int) -> slice:
        """The rows of one piece."""
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))


@dataclass(frozen=True)
class Apart:
    """Heads of one piece and budget whose method cannot be ranked with others.

    Args:
        method: theirs.
        budget: tokens of each.
        rows: which rows of the piece they are.
        heads: in the table of all prompts' heads.
    """

    method: Method
    budget: int
    rows: Ints
    heads: Ints


def compress(
    planned: PlannedBlocks,
    prompts: Prompts,
    budgets: Ints,
    pieces: Sequence[Asked],
    signals: Iterable[Signals],
    memory: Tensor,
    backend: Backend,
) -> list[Stored]:
    """Put the layers that prompts hold into pages; one answer for each prompt.

    Args:
        planned: the plan.
        prompts: whose requests' pages are taken as far as they are needed.
        budgets: tokens of each prompt's heads, ``[n, heads]``.
        pieces: in which methods are asked.
        signals: of each piece; may be made when they are needed.
        memory: the engine's, ``[bytes]`` uint8; written to in these pages alone.
        backend: who writes them.
    """
    a_layer = planned.policy.kv_heads
    kinds = planned.kinds[a_layer * prompts.layers.start : a_layer * prompts.layers.stop]
    methods = list(dict.fromkeys(option.method for option in planned.options))
    which = np.array([methods.index(option.method) for option in planned.options])
    rows = _rows(pieces, which[kinds], budgets)
    limits = _limits(methods, rows, [request.prompt_tokens for request in prompts.requests])
    apart = [_apart(methods, rows, number) for number in range(len(pieces))]
    others = [each for piece in apart for each in piece]

    heads = np.concatenate([rows.heads, *(each.heads for each in others)])
    later = [np.full(len(each.heads), each.budget) for each in others]
    sizes = np.concatenate([limits[:, 0], *later])
    laid = lay_out(planned, kinds, budgets, prompts.requests, (heads, sizes))
    tables = [heads, sizes, prompts.starts[heads // len(kinds)], rows.methods, limits]
    tables += [laid.tables, *(each.rows for each in others)]
    tables += [laid.records(layout) for layout in laid.layouts]
    head, count, start, method, limit, cells, *there = sent(tables, memory.device)

    scores, parts = _asked(methods, rows, method, signals, apart, there)
    tokens = [ragged.keep_each(scores, limit, int(limits[:, 0].sum()))]
    tokens += [part.tokens.flatten() for part in parts]
    # Of each kept token: its head, and its place among the tokens of all prompts.
    total = int(sizes.sum())
    owner, offset = (torch.repeat_interleave(x, count, output_size=total) for x in (head, start))
    places = torch.cat(tokens) + offset
    first, weights = len(rows.heads), None
    for part in parts:
        mine = slice(first, first := first + len(part.tokens))
        _store_merged(prompts, part, head[mine], start[mine])
        if part.balance is not None:
            ones = part.balance.new_ones(len(laid.first), planned.head_dim)
            weights = ones if weights is None else weights
            weights[head[mine].long()] = part.balance
    scales = _scales(laid, prompts, owner.long(), places)
    for layout, pages in zip(laid.layouts, there[len(others) :], strict=True):
        if len(pages):
            held = (prompts.keys, prompts.values, places.int(), pages, scales.view(-1, 2))
            fitted = Fitted(cells, weights) if layout.has_tables else None
            backend.write(memory, Writing(layout, *held, fitted))
    return [laid.stored(number, scales) for number in range(len(prompts.requests))]


def _rows(pieces: Sequence[Asked], methods: Ints, budgets: Ints) -> Rows:
    """The table of what is asked; ``methods`` are those of one prompt's heads."""
    counts = [len(piece.heads) for piece in pieces]
    prompts = np.repeat([piece.prompt for piece in pieces], counts)
    heads, ends = np.concatenate([piece.heads for piece in pieces]), np.cumsum(counts)
    table = len(methods) * prompts + heads
    return Rows(table, methods[heads], budgets[prompts, heads], prompts, ends)


def _limits(methods: Sequence[Method], rows: Rows, lengths: Sequence[int]) -> Ints:
    """What ``ragged.keep_each`` is given; a budget of 0 where a method is asked apart."""
    tokens = np.array(lengths)[rows.prompts]
    limits = np.stack([np.zeros_like(tokens)] * 3 + [tokens], axis=1)
    for number, method in enumerate(methods):
        if (known := _ranked(method)) is not None:
            mine = np.flatnonzero(rows.methods == number)
            limits[mine, :3] = ragged.limits(known, rows.budgets[mine].tolist(), 0)[:, :3]
    return limits


def _apart(methods: Sequence[Method], rows: Rows, number: int) -> list[Apart]:
    """What is asked apart about one piece."""
    piece, found = rows.piece(number), []
    mine, asked, heads = (x[piece] for x in (rows.methods, rows.budgets, rows.heads))
    for which, method in enumerate(methods):
        if _ranked(method) is None:
            for budget in np.unique(asked[mine == which]).tolist():
                alike = np.flatnonzero((mine == which) & (asked == budget))
                found.append(Apart(method, budget, alike, heads[alike]))
    return found


def _ranked(method: Method) -> ScoredMethod | None:
    """The method, where its heads can be ranked with others."""
    return method if isinstance(method, ScoredMethod) and method.ranks_alone else None


def _asked(
    methods: Sequence[Method],
    rows: Rows,
    which: Tensor,
    shown: Iterable[Signals],
    apart: Sequence[Sequence[Apart]],
    tables: Sequence[Tensor],
) -> tuple[Tensor, list[Part]]:
    """Ask about each piece, one after another.

    Args:
        methods: by number.
        rows: what is asked.
        which: the rows' methods, on the device.
        shown: signals of each piece.
        apart: what is asked apart about each piece.
        tables: rows of each of these, on the device.

    Returns:
        Scores of all rows ``[rows, P]``, minus infinity behind shorter prompts, and the parts of
        heads that are asked apart.
    """
    found, parts, table = list[Tensor](), list[Part](), iter(tables)
    for number, signals in enumerate(shown):
        here = rows.piece(number)
        found.append(_scores(methods, np.unique(rows.methods[here]).tolist(), which[here], signals))
        for asked in apart[number]:
            (part,) = asked.method.parts(signals, asked.budget)
            parts.append(_of_rows(part, next(table)))
    longest = max(each.shape[1] for each in found)
    scores = which.new_full((len(which), longest), -torch.inf, dtype=torch.float32)
    for number, each in enumerate(found):
        scores[rows.piece(number), : each.shape[1]] = each
    return scores, parts


def _scores(
    methods: Sequence[Method], numbers: Sequence[int], which: Tensor, signals: Signals
) -> Tensor:
    """Scores of one piece's heads, each by its own method; of those that are asked apart zeros."""
    found = None
    for number in numbers:
        if (method := _ranked(methods[number])) is not None:
            own = method.scores_once(signals)
            found = own if found is None else own.where(which[:, None] == number, found)
    if found is None:
        return torch.zeros(signals.keys.shape[:2], device=which.device)
    return found


def _of_rows(part: Part, rows: Tensor) -> Part:
    """Some heads' entries."""
    keys, values, balance = (
        None if each is None else each.index_select(0, rows)
        for each in (part.keys, part.values, part.balance)
    )
    return Part(part.tokens.index_select(0, rows), keys, values, balance=balance)


def _store_merged(prompts: Prompts, part: Part, heads: Tensor, starts: Tensor) -> None:
    """Write a part's keys and values over its tokens' own, which no method is shown again."""
    if part.keys is None or part.values is None:
        return
    rows, places = (heads % len(prompts.keys)).long()[:, None], part.tokens + starts[:, None]
    prompts.keys[rows, places], prompts.values[rows, places] = part.keys, part.values


def _scales(laid: Laid, prompts: Prompts, head: Tensor, places: Tensor) -> Tensor:
    """``[kinds, heads, 2]``, 1 but where formats share a scale among a head's tokens.

    Args:
        laid: the table of heads.
        prompts: what they hold.
        head: of each kept token, its head in the table.
        places: in the token axis of what prompts hold.
    """
    scales = torch.ones(KINDS, len(laid.first), 2, device=places.device)
    if any("fp8" in (layout.keys, layout.values) for layout in laid.layouts):
        held = (prompts.keys, prompts.values)
        magnitudes = torch.stack([x.abs().amax(-1) for x in held])[:, head % laid.heads, places]
        scales[CODED] = fp8_scales(magnitudes, head, len(laid.first))
    return scales
