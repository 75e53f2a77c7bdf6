"""What a plan makes of a step's prompts: tokens are chosen, and written into requests' pages.

All heads of all prompts and of many layers lie in one table: places and records are made of it in
one pass of the host, and all pages of a layout are written by one launch. A method is asked once
about heads of whatever budgets, so that a step costs the host about the same whatever number of
heads there are, and little more for each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvtune.policies import ragged
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.parts import Part
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend, Writing
from kvtune.runtime.cache.segments import CODED, Ints
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.storing import fp8_scales
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Stored
from kvtune.runtime.serving.laying import Laid, lay_out
from kvtune.runtime.serving.reading import Asked, Prompts


@dataclass(frozen=True)
class Question:
    """What one method is asked about its heads in a piece.

    Args:
        method: which.
        piece: number of the piece.
        heads: as they lie in the table of all prompts' heads.
        rows: of the piece's signals that these are.
        budgets: tokens of each of the piece's rows; 0 of others' heads. All budgets of the heads
            are the same where the method cannot rank heads of several at once.
    """

    method: Method
    piece: int
    heads: Ints
    rows: Ints
    budgets: Ints

    @property
    def is_ragged(self) -> bool:
        """Whether heads may have several budgets."""
        return isinstance(self.method, ScoredMethod) and self.method.ranks_alone

    def table(self) -> Ints:
        """What the device must know: limits of all of the piece's rows, or which rows are asked."""
        if isinstance(self.method, ScoredMethod) and self.is_ragged:
            return ragged.limits(self.method, self.budgets.tolist())
        return self.rows


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
    questions = [q for number, piece in enumerate(pieces)
                 for q in _questions(planned, number, piece, kinds, budgets)]  # fmt: skip
    listed = np.concatenate([question.heads for question in questions])
    laid = lay_out(planned, kinds, budgets, prompts.requests, listed)
    sizes, starts = (laid.exact + laid.coded)[listed], prompts.starts[listed // len(kinds)]
    records = [laid.records(layout) for layout in laid.layouts]
    tables = [question.table() for question in questions]
    order, counts, begins, *there = sent([listed, sizes, starts, *tables, *records], memory.device)
    chosen, merged = _choose(questions, signals, there)
    # Of each kept token: its head, and its place among the tokens of all prompts.
    head, start = (
        torch.repeat_interleave(each, counts, output_size=len(chosen)) for each in (order, begins)
    )
    places = chosen + start
    for first, part in merged:
        _store_merged(prompts, part, order[first:], begins[first:])
    scales = _scales(laid, prompts, head.long(), places)
    for layout, pages in zip(laid.layouts, there[len(questions) :], strict=True):
        if len(pages):
            writing = Writing(
                layout, prompts.keys, prompts.values, places.int(), pages, scales.view(-1, 2)
            )
            backend.write(memory, writing)
    return [laid.stored(number, scales) for number in range(len(prompts.requests))]


def _questions(
    planned: PlannedBlocks, number: int, piece: Asked, kinds: Ints, budgets: Ints
) -> Iterator[Question]:
    """All that is asked about one piece."""
    heads, prompts = np.array(piece.heads), np.array(piece.prompts)
    table = (len(kinds) * prompts[:, None] + heads).ravel()
    known = list(dict.fromkeys(option.method for option in planned.options))
    which = np.array([known.index(option.method) for option in planned.options])
    mine, asked = np.tile(which[kinds[heads]], len(prompts)), budgets[prompts][:, heads].ravel()
    for method in np.unique(mine).tolist():
        rows = np.flatnonzero(mine == method)
        theirs = np.where(mine == method, asked, 0)
        whole = Question(known[method], number, table[rows], rows, theirs)
        if whole.is_ragged:
            yield whole
            continue
        for budget in np.unique(asked[rows]).tolist():
            alike = rows[asked[rows] == budget]
            yield replace(whole, heads=table[alike], rows=alike, budgets=asked[alike])


def _choose(
    questions: Sequence[Question], signals: Iterable[Signals], tables: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[int, Part]]]:
    """Kept tokens, question by question and head by head, int64.

    Also the parts of methods that store other keys and values than the kept tokens' own, each with
    the number of its first head among all that are listed.
    """
    found, merged, first = [], [], 0
    asked = itertools.groupby(zip(questions, tables, strict=False), key=lambda both: both[0].piece)
    for (_, group), shown in zip(asked, signals, strict=True):
        for question, table in group:
            method = question.method
            if isinstance(method, ScoredMethod) and question.is_ragged:
                count = int(question.budgets.sum())
                found.append(ragged.keep_each(method.scores_once(shown), table, count))
            else:
                (part,) = method.parts(shown, int(question.budgets[0]))
                mine = _of_rows(part, table)
                found.append(mine.tokens.flatten())
                if mine.keys is not None:
                    merged.append((first, mine))
            first += len(question.heads)
    return torch.cat(found), merged


def _of_rows(part: Part, rows: Tensor) -> Part:
    """Some heads' entries."""
    whole = (part.tokens, part.keys, part.values)
    tokens, keys, values = (None if x is None else x.index_select(0, rows) for x in whole)
    return Part(part.tokens if tokens is None else tokens, keys, values)


def _store_merged(prompts: Prompts, part: Part, heads: Tensor, begins: Tensor) -> None:
    """Put a part's keys and values where its tokens' own were; nobody asks about these again."""
    if part.keys is None or part.values is None:
        return
    count = len(part.tokens)
    rows = (heads[:count] % len(prompts.keys)).long()[:, None]
    places = part.tokens + begins[:count, None]
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
