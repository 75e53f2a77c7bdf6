"""Memory and time of all plans at once, at any context, batch, card and memory limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kvtune.common.estimate import Estimate, Tier
from kvtune.policies.format import Format
from kvtune.policies.option import Option
from kvtune.policies.paging import Growth, held_bytes, waiting_bytes
from kvtune.policies.policy import Policy, footprint_of_lengths
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.memory.peak import add
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.tuner.explore.facts import EACH, Facts
from kvtune.tuner.explore.layout import each_on_stack
from kvtune.tuner.explore.plans import Floats, Integers
from kvtune.tuner.explore.steps import from_host, kernels, landing, reading_back, together
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
        time_tiers: of the seconds, ``[n]``.
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
    time_tiers: NDArray[np.str_]
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
        tier = "assumed" if column == "memory" else str(self.time_tiers[row])
        value, low, high = (float(end) for end in getattr(self, column)[row])
        return Estimate(value, low, high, units[column], cast(Tier, tier))


def figures_of(study: Study, setting: Setting) -> Figures:
    """Recompute every plan's memory and time; a few milliseconds for thousands of plans.

    Raises:
        KvtuneError: the model does not fit, or the limit is beyond the card.
    """
    plans, facts = study.plans, study.facts
    contexts = _or_own(setting.context_tokens, plans.context_tokens)
    sequences = _or_own(setting.sequences, plans.sequences)
    counts, heads = study.option_counts, study.plans.heads
    each = each_on_stack(facts, study.given, heads, contexts)
    if setting.weights != EACH or not len(plans):
        return figures(facts, study.given, counts, contexts, sequences, setting, heads, each)

    def of(name: str) -> tuple[Integers, Figures]:
        rows, alike = np.flatnonzero(study.weights == name), replace(setting, weights=name)
        asked = counts[rows], contexts[rows], sequences[rows], alike, heads[rows]
        return rows, figures(facts, study.given, *asked, None if each is None else each[rows])

    return _merged([of(str(name)) for name in np.unique(study.weights)])


def _merged(parts: Sequence[tuple[Integers, Figures]]) -> Figures:
    """Figures of groups of plans, given with their rows, as those of all plans."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    names = [f.name for f in fields(Figures) if f.name != "budgets"]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(found, name) for _, found in parts])[order] for name in names
    }
    budgets = {key: budget for _, found in parts for key, budget in found.budgets.items()}
    return Figures(**columns, budgets=budgets)


def figures(
    facts: Facts,
    given: Sequence[Policy],
    counts: Floats,
    contexts: Integers,
    sequences: Integers,
    setting: Setting,
    heads: NDArray[np.integer] | None = None,
    each: Floats | None = None,
) -> Figures:
    """The same for any policies, told by how many heads take each option.

    Args:
        facts: of the study.
        given: the options, O of them, each as a policy of one head.
        counts: ``[n, O]``.
        contexts: prompt tokens of a sequence, ``[n]``.
        sequences: at once, ``[n]``.
        setting: what is asked instead of the study's own.
        heads: numbers of options, layer by layer, ``[n, I]``; needed where any lies on the host.
        each: bytes of one sequence as a stack lays it out, ``[n]``; left out, in kvtune's pages.
    """
    shape, options = facts.shape, [next(policy.options()) for policy in given]
    rooms = {int(c): _room(facts, setting, int(c)) for c in np.unique(contexts)}
    size = shape.head_dim
    stored = _bytes_by_format(Option.bytes_by_format, options, counts, contexts, size)
    lengths = footprint_of_lengths(shape.layers, shape.kv_heads)
    prompt = sum(stored.values(), np.zeros(len(counts))) + lengths
    generated = shape.kv_bytes_per_token() * facts.generated_tokens
    held = each
    if held is None:
        held = _held(given, counts, contexts, size, facts.generated_tokens)
        held += landing(shape, options, heads, contexts)
    read = _bytes_by_format(_read_on_device, options, counts, contexts, size)
    read["bf16"] = read.get("bf16", np.zeros(len(counts))) + generated
    first = next(iter(rooms.values()), None)
    weights = first.weight_format if first else "bf16"
    batch = np.maximum(sequences, 1)
    time, tiers = together(
        (
            kernels(shape, setting.gpu, weights, read, batch),
            from_host(shape, setting.gpu, options, heads, contexts, batch),
            reading_back(shape, setting.gpu, given, counts, contexts, batch),
        )
    )
    waiting = _waiting(shape, given, counts, contexts)
    memory = _peaks(rooms, contexts, sequences, held) + waiting[:, None]
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
        time_tiers=tiers,
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


def _read_on_device(
    option: Option, tokens: int, prompt_tokens: int, head_dim: int
) -> dict[Format, int]:
    """What kernels read of a head at a step; of one on the host that is ``from_host``'s."""
    return {} if option.on_host else option.read_by_format(tokens, prompt_tokens, head_dim)


def _bytes_by_format(
    of: Callable[[Option, int, int, int], dict[Format, int]],
    options: Sequence[Option],
    counts: Floats,
    contexts: Integers,
    head_dim: int,
) -> dict[str, Floats]:
    """Bytes of one prompt of each plan, held or read, by the name of their format, ``[n]`` each."""
    names = sorted({form.name for option in options for form in of(option, 1, 1, head_dim)})
    found: dict[str, Any] = {name: np.zeros(len(counts)) for name in names}
    for context in np.unique(contexts):
        rows = contexts == context
        table = np.zeros((len(options), len(names)))
        for index, option in enumerate(options):
            tokens = option.budget.resolve(int(context))
            for form, size in of(option, tokens, int(context), head_dim).items():
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
        room = rooms[context]  # whose weights and overhead are found once
        peak = add(room.weights, room.overhead, room.at(batch).prefill)
        rest[row] = peak.value, peak.low, peak.high
    return rest[which] + (held * sequences)[:, None]
