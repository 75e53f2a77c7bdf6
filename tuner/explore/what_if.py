"""Memory and time of all plans at once, at any context, batch, card and memory limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate, Tier
from kvtune.policies.option import Option
from kvtune.policies.paging import (
    Growth,
    arriving_pages,
    held_bytes,
    share_of_slab,
    waiting_bytes,
)
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency.steps import decode_steps
from kvtune.simulator.memory.peak import peak_memory
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.tuner.explore.facts import EACH, Facts
from kvtune.tuner.explore.plans import Floats, Integers
from kvtune.tuner.explore.study import Study


@dataclass(frozen=True)
class Setting:
    """Where plans are to run.

    Args:
        gpu: the card.
        memory_bytes: that everything together may take.
        weights: a format, ``auto``, or ``each`` for each plan's own.
        context_tokens: prompt tokens of a sequence; None for each plan's own.
        sequences: at once; None for each plan's own.
    """

    gpu: GpuProfile
    memory_bytes: int
    weights: str
    context_tokens: int | None = None
    sequences: int | None = None

    @staticmethod
    def asked(facts: Facts) -> Setting:
        """The one that the search was for."""
        return Setting(facts.card, facts.memory_bytes, facts.weights)


@dataclass(frozen=True)
class Figures:
    """What n plans take and how fast they run; each a column of rows value, low, high, ``[n, 3]``.

    Args:
        context_tokens: of a sequence, ``[n]``.
        sequences: at once, ``[n]``.
        prompt_bytes: of one compressed prompt, ``[n]``.
        share: of the bf16 bytes of the same prompt, ``[n]``.
        each: bytes that the allocator hands out for one sequence, ``[n]``.
        waiting: bytes of one prompt that is held uncompressed until its end, ``[n]``.
        tokens_that_fit: prompt tokens at once in what is left for the cache, ``[n]``.
        memory: peak of everything together, bytes.
        step_s: one decode step of all sequences, seconds.
        tokens_per_s: of all sequences together.
        fits: whether the peak is within the limit, ``[n]``.
        time_tier: of the seconds.
        weights: format of the model's weights, as it was asked for, ``[n]``.
        budgets: where the memory goes, by that and context.
    """

    context_tokens: Integers
    sequences: Integers
    prompt_bytes: Integers
    share: Floats
    each: Floats
    waiting: Floats
    tokens_that_fit: Integers
    memory: Floats
    step_s: Floats
    tokens_per_s: Floats
    fits: NDArray[np.bool_]
    time_tier: Tier
    weights: NDArray[np.str_]
    budgets: dict[tuple[str, int], MemoryPlan]

    def budget(self, row: int) -> MemoryPlan:
        """Where the memory of one plan goes."""
        return self.budgets[str(self.weights[row]), int(self.context_tokens[row])]

    def most(self, row: int) -> Estimate:
        """Sequences of one plan that fit at once."""
        return self.budget(row).most_of(float(self.each[row]), int(self.waiting[row]))

    def estimate(self, column: str, row: int) -> Estimate:
        """One figure with its interval and tier."""
        units = {"memory": "B", "step_s": "s", "tokens_per_s": "tokens/s"}
        tier: Tier = "assumed" if column == "memory" else self.time_tier
        value, low, high = (float(end) for end in getattr(self, column)[row])
        return Estimate(value, low, high, units[column], tier)


def figures_of(study: Study, setting: Setting) -> Figures:
    """Recompute every plan's memory and time; a few milliseconds for thousands of plans.

    Raises:
        KvtuneError: the model does not fit, or the limit is beyond the card.
    """
    plans, facts = study.plans, study.facts
    contexts = _or_own(setting.context_tokens, plans.context_tokens)
    sequences = _or_own(setting.sequences, plans.sequences)
    counts, landing = study.option_counts, _landing(study, contexts)
    if setting.weights != EACH or not len(plans):
        return figures(facts, study.given, counts, contexts, sequences, setting, landing)

    def of(name: str) -> tuple[Integers, Figures]:
        rows, alike = np.flatnonzero(study.weights == name), replace(setting, weights=name)
        asked = counts[rows], contexts[rows], sequences[rows], alike, landing[rows]
        return rows, figures(facts, study.given, *asked)

    return _merged([of(str(name)) for name in np.unique(study.weights)])


def _merged(parts: Sequence[tuple[Integers, Figures]]) -> Figures:
    """Figures of groups of plans, given with their rows, as those of all plans."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    names = [f.name for f in fields(Figures) if f.name not in ("time_tier", "budgets")]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(found, name) for _, found in parts])[order] for name in names
    }
    budgets = {key: budget for _, found in parts for key, budget in found.budgets.items()}
    return Figures(**columns, time_tier=parts[0][1].time_tier, budgets=budgets)


def figures(
    facts: Facts,
    given: Sequence[Policy],
    counts: Floats,
    contexts: Integers,
    sequences: Integers,
    setting: Setting,
    landing: Floats | int = 0,
) -> Figures:
    """The same for any policies, told by how many heads take each option.

    Args:
        facts: of the study.
        given: the options, O of them, each as a policy of one head.
        counts: ``[n, O]``.
        contexts: prompt tokens of a sequence, ``[n]``.
        sequences: at once, ``[n]``.
        setting: what is asked instead of the study's own.
        landing: bytes where pages from the host land, ``[n]``; which heads share a layer decides.
    """
    shape, options = facts.shape, [next(policy.options()) for policy in given]
    rooms = {int(c): _room(facts, setting, int(c)) for c in np.unique(contexts)}
    stored = _bytes_by_format(options, counts, contexts, shape.head_dim)
    lengths = footprint_of_lengths(shape.layers, shape.kv_heads)
    prompt = sum(stored.values(), np.zeros(len(counts))) + lengths
    generated = shape.kv_bytes_per_token() * facts.generated_tokens
    held = landing + _held(given, counts, contexts, shape.head_dim, facts.generated_tokens)
    stored["bf16"] = stored.get("bf16", np.zeros(len(counts))) + generated
    first = next(iter(rooms.values()), None)
    weights = first.weight_format if first else "bf16"
    steps = decode_steps(
        shape, setting.gpu, weights, np.maximum(sequences, 1), dict(stored), "runtime"
    )
    time = np.stack([steps.value_s, steps.low_s, steps.high_s], axis=-1).reshape(-1, 3)
    waiting = _waiting(shape, given, counts, contexts)
    memory = _peaks(shape, setting, rooms, contexts, sequences, held) + waiting[:, None]
    return Figures(
        context_tokens=contexts,
        sequences=sequences,
        prompt_bytes=prompt.astype(np.int64),
        share=prompt / np.maximum(contexts * shape.kv_bytes_per_token(), 1),
        each=held,
        waiting=waiting,
        tokens_that_fit=_that_fit(rooms, contexts, held, waiting) * contexts,
        memory=memory,
        step_s=time,
        tokens_per_s=sequences[:, None] / time[:, [0, 2, 1]],
        fits=memory[:, 0] <= setting.memory_bytes,
        time_tier=steps.tier,
        weights=np.full(len(contexts), setting.weights),
        budgets={(setting.weights, context): budget for context, budget in rooms.items()},
    )


def _or_own(asked: int | None, own: Integers) -> Integers:
    return own if asked is None else np.full(len(own), asked, np.int64)


def _room(facts: Facts, setting: Setting, context: int) -> MemoryPlan:
    return memory_plan(
        facts.shape,
        setting.gpu,
        setting.memory_bytes,
        context_tokens=context,
        generated_tokens=facts.generated_tokens,
        weights=setting.weights,
    )


def _that_fit(
    rooms: dict[int, MemoryPlan], contexts: Integers, held: Floats, waiting: Floats
) -> Integers:
    """Sequences of each plan that fit at once, ``[n]``; counted one by one where needed alone."""
    found = np.zeros(len(contexts), np.int64)
    for context, budget in rooms.items():
        rows = np.flatnonzero(contexts == context)
        most = ((budget.room(1) - waiting[rows]).clip(0) // held[rows]).astype(np.int64)
        counts, which = np.unique(most, return_inverse=True)
        room = np.array([budget.room(int(count)) for count in counts])[which]
        found[rows] = most
        for row in rows[most * held[rows] + waiting[rows] > room]:
            found[row] = budget.count(float(held[row]), int(waiting[row]))
    return found


def _bytes_by_format(
    options: Sequence[Option], counts: Floats, contexts: Integers, head_dim: int
) -> dict[str, Floats]:
    """Bytes of one compressed prompt of each plan, by the name of their format, ``[n]`` each."""
    names = sorted({form.name for o in options for form in o.bytes_by_format(1, 1, head_dim)})
    found: dict[str, Any] = {name: np.zeros(len(counts)) for name in names}
    for context in np.unique(contexts):
        rows = contexts == context
        table = np.zeros((len(options), len(names)))
        for index, option in enumerate(options):
            tokens = option.budget.resolve(int(context))
            for form, size in option.bytes_by_format(tokens, int(context), head_dim).items():
                table[index, names.index(form.name)] += size
        for name, column in zip(names, (counts[rows] @ table).T, strict=True):
            found[name][rows] = column
    return found


def _held(
    given: Sequence[Policy], counts: Floats, contexts: Integers, head_dim: int, generated: int
) -> Floats:
    """Bytes that the allocator hands out for one sequence of each plan, ``[n]``."""
    found, growth = np.zeros(len(counts)), Growth(generated)
    for context in np.unique(contexts):
        rows, tokens = contexts == context, int(context)
        each = [held_bytes(policy, tokens, head_dim, growth) for policy in given]
        found[rows] = counts[rows] @ np.array(each, np.float64)
    return found


def _landing(study: Study, contexts: Integers) -> Floats:
    """Bytes where pages from the host land, the largest layer's of each size, ``[n]``."""
    shape, options = study.facts.shape, study.facts.options
    found = np.zeros(len(contexts))
    if not any(option.on_host for option in options):
        return found
    heads = study.plans.heads.reshape(-1, shape.layers, shape.kv_heads)
    for context in np.unique(contexts).tolist():
        rows = contexts == context
        pages = [
            arriving_pages(o, o.budget.resolve(context), context, shape.head_dim) for o in options
        ]
        for layout in {layout for each in pages for layout in each}:
            counts = np.array([each[layout] for each in pages])
            found[rows] += share_of_slab(layout) * counts[heads[rows]].sum(2).max(1)
    return found.round()


def _waiting(
    shape: ModelShape, given: Sequence[Policy], counts: Floats, contexts: Integers
) -> Floats:
    """Bytes of one prompt that plans hold uncompressed until its end; 0 of others, ``[n]``."""
    waits = np.array([policy.waits for policy in given], bool)
    lengths, which = np.unique(contexts, return_inverse=True)
    full = [shape.kv_bytes(int(context)) for context in lengths]
    each = np.array([waiting_bytes(held, shape.layers) for held in full], np.float64)
    held: Floats = each[which] * (counts[:, waits].sum(1) > 0)
    return held


def _peaks(
    shape: ModelShape,
    setting: Setting,
    rooms: dict[int, MemoryPlan],
    contexts: Integers,
    sequences: Integers,
    held: Floats,
) -> Floats:
    """Peak memory, ``[n, 3]``: what does not depend on the plan, and its cache."""
    most = int(sequences.max(initial=0)) + 1
    pairs, which = np.unique(contexts * most + sequences, return_inverse=True)
    rest = np.zeros((len(pairs), 3))
    for row, pair in enumerate(pairs.tolist()):
        context, batch = divmod(pair, most)
        peak = peak_memory(shape, setting.gpu, rooms[context].weight_format, 0, context, batch)
        rest[row] = peak.value, peak.low, peak.high
    return rest[which] + (held * sequences)[:, None]
