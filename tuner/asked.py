"""What a request comes to once memory and quality are known: a question, and facts to look at."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvtune
from kvtune.policies.paging import Growth, head_bytes, sequence_bytes
from kvtune.policies.slabs import growing_bytes
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.answer import cost_of
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.explore.facts import EACH, Facts
from kvtune.tuner.explore.record import selection_split
from kvtune.tuner.limits import Excess, no_limits
from kvtune.tuner.on_stack import BytesThere, bytes_there
from kvtune.tuner.question import Question
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.serving_room import Budgets, budgets_of, formats_of, freed, rooms
from kvtune.tuner.solver import Solver, policy_of
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.within import limits_of


def question_of(request: SearchRequest, budgets: Budgets, source: QualitySource) -> Question:
    """The question of a request: its tables, the room for caches, and what limits a plan."""
    shape, growth = request.shape, Growth(request.generated_tokens)
    generated = growing_bytes(request.generated_tokens, shape.head_dim)

    def held(context: int) -> NDArray[np.int64]:
        """Beyond what generated tokens alone take: both lie in the same pages."""
        options = [
            head_bytes(o, o.budget.resolve(context), context, shape.head_dim, growth)
            for o in source.tables.options
        ]
        rules = [
            sequence_bytes(rule.policy(1, 1), context, shape.head_dim, growth)
            for rule in source.tables.rules
        ]
        return np.array([*options, *rules], np.int64) - round(generated)

    there = bytes_there(request.stack, source.tables, shape, request.generated_tokens)
    memory = {context: budget for (_, context), budget in reversed(budgets.items())}

    def working(context: int, sequences: int) -> int:
        return memory[context].beside_working() - memory[context].room(sequences)

    return Question(
        tables=source.tables,
        head_dim=shape.head_dim,
        rooms=rooms(budgets),
        held={context: held(context) for context in rooms(budgets)},
        generated_bytes=round(generated) * shape.layers * shape.kv_heads,
        working=working,
        sequences=request.sequences,
        limits=limits_of(request.stack),
        most_read=request.read_bytes,
        excess=_excess(request, budgets, source, there),
        most_moved=request.moved_bytes,
        freed=freed(budgets),
        bytes_there=there,
    )


def solver_of(request: SearchRequest, source: QualitySource) -> Solver:
    """The question of a request over given tables, ready to answer trials."""
    return Solver.of(question_of(request, budgets_of(request), source))


def _excess(
    request: SearchRequest, budgets: Budgets, source: QualitySource, there: BytesThere | None
) -> Excess:
    """How far candidates are beyond the request's limits, by the figures that are printed."""
    if not request.limits.are_set:
        return no_limits

    def excess(candidate: Candidate) -> dict[str, float]:
        policy = policy_of(source.tables, candidate.choice, "")
        cost = cost_of(budgets, policy, candidate, there)
        return request.limits.excess(cost, candidate.sequences)

    return excess


def facts_of(request: SearchRequest, budgets: Budgets, source: QualitySource) -> Facts:
    """What all plans share, for those who look at them."""
    tables, formats = source.tables, formats_of(budgets)
    samples = tables.samples
    splits = Counter(sample.split for sample in samples)
    return Facts(
        study=_study_key(request, source),
        kvtune=kvtune.__version__,
        shape=request.shape,
        gpu=request.gpu.slug,
        memory_bytes=request.memory_bytes,
        weights=formats[0] if len(formats) == 1 else EACH,
        generated_tokens=request.generated_tokens,
        largest_kl=request.largest_kl,
        trials=0 if source.stand_in else request.trials,
        seed=request.seed,
        source="stand-in" if source.stand_in else "own trace",
        stand_in=source.stand_in,
        kinds=tuple(sorted({s.kind for s in samples if s.split == "evaluate"})),
        selection_samples=splits[selection_split(tables)],
        held_out_samples=splits["evaluate"],
        measured_tokens=tables.prompt_tokens,
        stack=request.stack or "",
        **given(tables),
    )


def given(tables: Tables) -> dict[str, Any]:
    """What a head may be given, rules behind the options, and their allocators."""
    return {
        "options": (*tables.options, *(rule.option for rule in tables.rules)),
        "allocators": tuple(rule.allocator.name for rule in tables.rules),
    }


def _study_key(request: SearchRequest, source: QualitySource) -> str:
    """A journal belongs to one question; another limit or model begins another.

    Prompt lengths that only the chosen plan runs at, once it is chosen, begin none.
    """
    question = replace(request, run_dir=Path(), trials=0, engine=None, lengths=None)
    asked = asdict(replace(question, shape=None, gpu=None))  # type: ignore[arg-type]
    names = [
        request.shape.name,
        request.gpu.slug,
        source.provenance.get("trace") or source.provenance.get("sources"),
    ]
    text = json.dumps([asked, names, kvtune.__version__], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
