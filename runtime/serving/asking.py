"""What methods say about a step's prompts: asked piece by piece, then ranked at once.

Heads of all methods, budgets and lengths are ranked in one pass, as far as their scores have room;
methods that cannot be ranked with others answer for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies import ragged
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.parts import Part
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.segments import Ints
from kvtune.runtime.serving.reading import Asked

_RANKED_AT_ONCE = 2**22
"""Scores, counted as long as the longest prompt's, that are ranked in one pass: each takes some 50
bytes meanwhile. A long prompt beside hundreds of short ones would else take gigabytes."""


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


def rows_of(pieces: Sequence[Asked], methods: Ints, budgets: Ints) -> Rows:
    """The table of what is asked; ``methods`` are those of one prompt's heads."""
    counts = [len(piece.heads) for piece in pieces]
    prompts = np.repeat([piece.prompt for piece in pieces], counts)
    heads, ends = np.concatenate([piece.heads for piece in pieces]), np.cumsum(counts)
    table = len(methods) * prompts + heads
    return Rows(table, methods[heads], budgets[prompts, heads], prompts, ends)


def limits_of(methods: Sequence[Method], rows: Rows, lengths: Sequence[int]) -> Ints:
    """What ``ragged.keep_each`` is given; a budget of 0 where a method is asked apart."""
    tokens = np.array(lengths)[rows.prompts]
    limits = np.stack([np.zeros_like(tokens)] * 3 + [tokens], axis=1)
    for number, method in enumerate(methods):
        if (known := _ranked(method)) is not None:
            mine = np.flatnonzero(rows.methods == number)
            limits[mine, :3] = ragged.limits(known, rows.budgets[mine].tolist(), 0)[:, :3]
    return limits


def asked_apart(methods: Sequence[Method], rows: Rows, number: int) -> list[Apart]:
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


def ask(
    methods: Sequence[Method],
    rows: Rows,
    which: Tensor,
    shown: Iterable[Signals],
    apart: Sequence[Sequence[Apart]],
    tables: Sequence[Tensor],
) -> tuple[list[Tensor], list[Part]]:
    """Ask about each piece, one after another.

    Args:
        methods: by number.
        rows: what is asked.
        which: the rows' methods, on the device.
        shown: signals of each piece.
        apart: what is asked apart about each piece.
        tables: rows of each of these, on the device.

    Returns:
        Each piece's scores, ``[rows, P]``, and the parts of heads that are asked apart.
    """
    found, parts, table = list[Tensor](), list[Part](), iter(tables)
    for number, signals in enumerate(shown):
        here = rows.piece(number)
        found.append(_scores(methods, np.unique(rows.methods[here]).tolist(), which[here], signals))
        for asked in apart[number]:
            (part,) = asked.method.parts(signals, asked.budget)
            parts.append(_of_rows(part, next(table)))
    return found, parts


def keep(scores: Sequence[Tensor], rows: Rows, limit: Tensor, limits: Ints) -> list[Tensor]:
    """Tokens of all rows, one list after another; neighbouring pieces are ranked together.

    Args:
        scores: of each piece.
        rows: of all pieces.
        limit: what ``ragged.keep_each`` is given about them, on the device.
        limits: the same on the host.
    """
    kept = []
    for pieces in _together([tuple(each.shape) for each in scores]):
        here = slice(rows.piece(pieces[0]).start, rows.piece(pieces[-1]).stop)
        one = _as_long([scores[number] for number in pieces])
        kept.append(ragged.keep_each(one, limit[here], int(limits[here, 0].sum())))
    return kept


def _together(shapes: Sequence[tuple[int, ...]]) -> list[range]:
    """Runs of neighbouring pieces, each as long as ``_RANKED_AT_ONCE`` allows, one piece at least.

    Args:
        shapes: rows and tokens of each piece.
    """
    found, first, heads, longest = list[range](), 0, 0, 0
    for number, (more, tokens) in enumerate(shapes):
        heads, longest = heads + more, max(longest, tokens)
        if number > first and heads * longest > _RANKED_AT_ONCE:
            found.append(range(first, number))
            first, heads, longest = number, more, tokens
    return [*found, range(first, len(shapes))]


def _as_long(scores: Sequence[Tensor]) -> Tensor:
    """One table of several, ``[rows, P]``; minus infinity behind shorter ones."""
    longest = max(each.shape[1] for each in scores)
    padded = [F.pad(x, (0, longest - x.shape[1]), value=-torch.inf) for x in scores]
    return torch.cat(padded).float()


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
    """The part of some of its heads alone."""
    keys, values, balance = (
        None if each is None else each.index_select(0, rows)
        for each in (part.keys, part.values, part.balance)
    )
    return Part(part.tokens.index_select(0, rows), keys, values, balance=balance)
