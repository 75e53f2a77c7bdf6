"""What a plan makes of a step's prompts: tokens are chosen, and written into requests' pages.

All heads of all prompts and of many layers lie in one table: places and records are made of it in
one pass of the host, and all pages of a layout are written by one launch. Methods score prompts
piece by piece; heads of all methods, budgets and lengths are then ranked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.parts import Part
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.backend import Backend, FittedTables, Writing
from kvtune.runtime.cache.segments import CODED, Ints
from kvtune.runtime.cache.sending import sent
from kvtune.runtime.cache.storing import fp8_scales, is_coded
from kvtune.runtime.serving.asking import ask, asked_apart, keep, limits_of, rows_of
from kvtune.runtime.serving.blocks import PlannedBlocks
from kvtune.runtime.serving.held import KINDS, Stored
from kvtune.runtime.serving.laying import Laid, lay_out
from kvtune.runtime.serving.reading import Asked, Prompts


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
    rows = rows_of(pieces, which[kinds], budgets)
    limits = limits_of(methods, rows, [request.prompt_tokens for request in prompts.requests])
    apart = [asked_apart(methods, rows, number) for number in range(len(pieces))]
    others = [each for piece in apart for each in piece]

    heads = np.concatenate([rows.heads, *(each.heads for each in others)])
    later = [np.full(len(each.heads), each.budget) for each in others]
    sizes = np.concatenate([limits[:, 0], *later])
    laid = lay_out(planned, kinds, budgets, prompts.requests, (heads, sizes))
    tables = [heads, sizes, prompts.starts[heads // len(kinds)], rows.methods, limits]
    tables += [laid.tables, laid.first, laid.exact, *(each.rows for each in others)]
    tables += [laid.records(layout) for layout in laid.layouts]
    head, count, start, method, limit, cells, begin, exact, *there = sent(tables, memory.device)

    scores, parts = ask(methods, rows, method, signals, apart, there)
    tokens = keep(scores, rows, limit, limits)
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
    owner = owner.long()
    scales = _scales(laid, prompts, owner, places, is_coded(owner, begin, exact))
    for layout, pages in zip(laid.layouts, there[len(others) :], strict=True):
        if len(pages):
            held = (prompts.keys, prompts.values, places.int(), pages, scales.view(-1, 2))
            fitted = FittedTables(cells, weights) if layout.has_tables else None
            backend.write(memory, Writing(layout, *held, fitted))
    return [laid.stored(number, scales) for number in range(len(prompts.requests))]


def _store_merged(prompts: Prompts, part: Part, heads: Tensor, starts: Tensor) -> None:
    """Write a part's keys and values over its tokens' own, which no method is shown again."""
    if part.keys is None or part.values is None:
        return
    rows, places = (heads % len(prompts.keys)).long()[:, None], part.tokens + starts[:, None]
    prompts.keys[rows, places], prompts.values[rows, places] = part.keys, part.values


def _scales(laid: Laid, prompts: Prompts, head: Tensor, places: Tensor, coded: Tensor) -> Tensor:
    """``[kinds, heads, 2]``, 1 but where formats share a scale among a head's tokens.

    Args:
        laid: the table of heads.
        prompts: what they hold.
        head: of each kept token, its head in the table.
        places: in the token axis of what prompts hold.
        coded: whether it is one that its format codes.
    """
    scales = torch.ones(KINDS, len(laid.first), 2, device=places.device)
    if any(layout.has_head_scales for layout in laid.layouts):
        held = (prompts.keys, prompts.values)
        magnitudes = torch.stack([x.abs().amax(-1) for x in held])[:, head % laid.heads, places]
        scales[CODED] = fp8_scales(magnitudes, head, coded, len(laid.first))
    return scales
