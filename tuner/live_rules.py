"""A rule as a plan where the model's own trace is at hand: replayed, then run live beside others.

Plans head by head are what the tables prefer; a rule that decides by the prompt knows what they do
not. Replay on the selection samples finds the best of all families at the bytes of the study's
pick, and live rounds run it whatever the tables say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvtune.common.progress import Progress
from kvtune.policies.formats.grouped import Int3, Int4, Int8
from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Floats
from kvtune.tuner.answer import Found
from kvtune.tuner.baselines import FAMILIES, STRONG, strong_families
from kvtune.tuner.beside import replayed
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.filling import Filling, held_by_runtime

FORMS = (Int3(exact_first=4), Int4(exact_first=4), Int8())
"""Those in which rules did best at any share (``benchmarks/results/quality-h200.json``)."""
_ROUGHLY = 6  # every so many layers decide which of a family's rules is replayed in full


def best_rule(found: Found, beside: Candidate, progress: Progress) -> Rule | None:
    """The rule with the least predicted loss at the bytes of another plan; None where none fits.

    Args:
        found: a study on the model's own trace.
        beside: says context, sequences and weights.
        progress: told of replayed samples.
    """
    source, trace = found.source, found.source.trace
    rules = list(_rules(found, beside))
    if trace is None or source.loaded is None or not rules:
        return None
    tables = source.tables
    policies = [rule.policy(tables.layers, tables.kv_heads) for rule in rules]
    judged = trace.of_split("select") or trace.of_split("search")
    rough = replayed(source, judged, policies, every=_ROUGHLY, progress=progress).mean(1)
    families = {rule.family for rule in rules}
    kept = [
        min((n for n, rule in enumerate(rules) if rule.family == family), key=lambda n: rough[n])
        for family in sorted(families)
    ]
    samples = [*judged, *trace.of_split("evaluate")]
    losses = replayed(source, samples, [policies[n] for n in kept], progress=progress)
    best = int(losses[:, : len(judged)].mean(1).argmin())
    known = dict(zip((sample.id for sample in samples), losses[best].tolist(), strict=True))
    by_sample: Floats = np.array([known.get(s.id, np.nan) for s in tables.samples], np.float32)
    return replace(rules[kept[best]], loss=by_sample)


def _rules(found: Found, beside: Candidate) -> Iterator[Rule]:
    """Every family's rules at a plan's bytes, their losses yet unknown."""
    request, trace = found.request, found.source.trace
    if trace is None or request.stack is not None or request.reads_less:
        return
    shape, question = request.shape, found.solver.question.under(beside.weights)
    held = held_by_runtime(shape.head_dim, request.generated_tokens)
    filling = Filling(question, held, beside.context, beside.sequences)
    for family in ("adakv", *strong_families(trace.manifest["signals"])):
        for allocator, method in (FAMILIES | STRONG)[family]:
            for form in FORMS:
                filled = filling.filled(allocator, method, form)
                if filled is not None and filled.allocator == allocator:
                    yield Rule(family, filled.option, allocator, np.zeros(0, np.float32))
