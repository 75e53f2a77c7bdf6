"""Policies side by side in one generation: whose heads step together, in which cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.method import Method
from kvtune.policies.option import Option
from kvtune.policies.parts import PartPlan
from kvtune.policies.policy import Policy
from kvtune.policies.room import beyond_prompt, goes_on_evicting
from kvtune.policies.signals import Signals
from kvtune.policies.slot_bytes import Forms, stores_apart
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache, joined
from kvtune.traces.geometry import Geometry


@dataclass(frozen=True)
class LivePolicy:
    """A policy in a generation.

    Args:
        policy: its budgets hold all entries, prompt and generated, where its method evicts.
        evicts: whether methods that can go on evicting do; if not, all generated tokens stay.
        residual: newest generated tokens that stay in 16 bits, up to twice as many, where a head
            stores fewer bits.
        limit_bytes: of all heads together, statistics and lengths included, that the cache never
            exceeds; None for no limit.
    """

    policy: Policy
    evicts: bool = True
    residual: int = 0
    limit_bytes: int | None = None

    @property
    def name(self) -> str:
        """The policy's, and whether generated tokens stay."""
        return self.policy.name if self.evicts else f"{self.policy.name}, prompt only"


@dataclass(frozen=True)
class Kind:
    """What heads must have in common to share a cache; growing ones also their size."""

    method: Method
    evicts: bool
    tokens: int
    forms: Forms
    residual: int


@dataclass(frozen=True)
class Group:
    """Heads of one layer that step together: the same heads of all policies with one method.

    Args:
        kind: what they have in common.
        rows: of the batch.
        heads: KV heads of the layer.
        cache: theirs, ``[rows, heads, ...]``.
    """

    kind: Kind
    rows: tuple[int, ...]
    heads: tuple[int, ...]
    cache: SlotCache

    @cached_property
    def index(self) -> tuple[Tensor | slice, Tensor | slice]:
        """Picks ``[rows, heads, ...]`` out of a tensor ``[B, H, ...]``; of neighbours a view."""
        if (rows := _slice(self.rows)) and (heads := _slice(self.heads)):
            return rows, heads
        device = self.cache.keys.device
        each, beside = (torch.tensor(x, device=device) for x in (self.rows, self.heads))
        return each[:, None], beside[None]


def _slice(numbers: tuple[int, ...]) -> slice | None:
    """Numbers that are equally far apart as a slice; None of others."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    alike = range(numbers[0], numbers[-1] + 1, step) if step > 0 else range(0)
    return slice(alike.start, alike.stop, step) if numbers == tuple(alike) else None


def check(geometry: Geometry, prompt_ids: Sequence[int], policies: Sequence[LivePolicy]) -> None:
    """Refuse what cannot be generated from.

    Raises:
        KvtuneError: a prompt of one token, another model's policy, or one that stores tokens
            together or other entries than tokens.
    """
    if len(prompt_ids) < 2:
        raise KvtuneError(
            f"a prompt of {len(prompt_ids)} tokens leaves nothing to compress",
            hint="give two tokens or more: the last one is the first to be read from the cache.",
        )
    for live in policies:
        live.policy.check_fits(geometry.layers, geometry.kv_heads)
        forms = {form for o in live.policy.options() for form in (o.keys, o.values)}
        if shared := sorted(form.label for form in forms if not stores_apart(form)):
            raise KvtuneError(
                f"the policy {live.name!r} stores {', '.join(shared)}, whose tokens share "
                "scales, and a generation that evicts has to let each leave alone",
                hint="use bf16 or a format of single tokens (rotated_int4, or keys_by: token), or "
                "measure the policy with kvtune validate.",
            )
        for option in live.policy.options():
            _check_slots(option, len(prompt_ids) - 1)


def _check_slots(option: Option, prompt_tokens: int) -> None:
    """Refuse what slots of tokens in 16 bits, all of which are read, cannot hold.

    Raises:
        KvtuneError: names the option.
    """
    budget = option.budget.resolve(prompt_tokens)
    plans = option.method.plan(budget, prompt_tokens)
    plain = all(plan == PartPlan(plan.entries) for plan in plans)
    if not plain or option.method.reader(budget) is not None:
        raise KvtuneError(
            f"{option.label!r} stores more than tokens in 16 bits that every step reads, which a "
            "generation that evicts does not hold",
            hint="measure the policy with kvtune validate.",
        )


def groups(
    policies: Sequence[LivePolicy],
    layer: int,
    tokens: NDArray[np.int64],
    signals: Signals,
    room: int,
) -> list[Group]:
    """One layer's caches, holding the compressed prompt.

    Args:
        policies: B of them.
        layer: which.
        tokens: of the prompt that each head may keep, ``[B, H]``.
        signals: of the layer.
        room: tokens that will be generated at most.
    """
    found = []
    for (kind, heads), rows in _shared(policies, layer, tokens).items():
        options = [[policies[row].policy.heads[layer][head] for head in heads] for row in rows]
        kept = tokens[np.ix_(rows, heads)]
        prompt = prompt_of(
            kind.method, signals, kept, heads=heads, evicts=kind.evicts, forms=kind.forms
        )
        method = kind.method if kind.evicts and isinstance(kind.method, DecodeMethod) else None
        beyond = [[beyond_prompt(option, signals.prompt_tokens) for option in o] for o in options]
        budgets = np.maximum(kept, beyond)
        cache = SlotCache(method, prompt, signals, budgets, room, heads, kind.forms, kind.residual)
        found.append(Group(kind, tuple(rows), heads, cache))
    return found


def side_by_side(prompts: Sequence[list[Group]]) -> list[Group]:
    """One layer's caches of several equally long prompts, those that are alike as one.

    Args:
        prompts: each one's groups; a group's rows are policies.

    Returns:
        Groups whose rows are ``policy * prompts + prompt``.
    """
    alike: dict[object, list[tuple[int, Group]]] = {}
    for prompt, found in enumerate(prompts):
        for group in found:
            key = group.kind, group.rows, group.heads
            alike.setdefault(key, []).append((prompt, group))
    return [_joined(each, len(prompts)) for each in alike.values()]


def _joined(alike: Sequence[tuple[int, Group]], prompts: int) -> Group:
    first = alike[0][1]
    rows = tuple(row * prompts + prompt for row in first.rows for prompt, _ in alike)
    return Group(first.kind, rows, first.heads, joined([group.cache for _, group in alike]))


def _shared(
    policies: Sequence[LivePolicy], layer: int, tokens: NDArray[np.int64]
) -> dict[tuple[Kind, tuple[int, ...]], list[int]]:
    """Rows of the batch by what their heads have in common, and by which heads those are."""
    found: dict[tuple[Kind, tuple[int, ...]], list[int]] = {}
    for row, live in enumerate(policies):
        heads_of: dict[Kind, list[int]] = {}
        for head, option in enumerate(live.policy.heads[layer]):
            kind = _kind(option, live, int(tokens[row, head]))
            heads_of.setdefault(kind, []).append(head)
        for kind, heads in heads_of.items():
            found.setdefault((kind, tuple(heads)), []).append(row)
    return found


def _kind(option: Option, live: LivePolicy, tokens: int) -> Kind:
    goes_on = live.evicts and goes_on_evicting(option)
    forms = option.keys, option.values
    return Kind(option.method, goes_on, 0 if goes_on else tokens, forms, live.residual)
