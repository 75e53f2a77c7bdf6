"""The study: the same seed the same answer, resumed or not, and nothing that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.candidate import Candidate, front, pick
from kvtune.tuner.question import Question
from kvtune.tuner.solver import Solver
from kvtune.tuner.study import run_study

Make = Callable[..., Tables]
FULL_PROMPT = 2 * 2 * 256 * 16 * 6
GENERATED = 4096


@pytest.fixture(scope="module")
def tables(make_tables: Make) -> Tables:
    return make_tables()


def question(tables: Tables, room: float = 3.0, sequences: int | None = None) -> Question:
    """Room for so many uncompressed prompts."""
    return asked_of(tables, {256: int(room * FULL_PROMPT)}, sequences)


def asked_of(tables: Tables, rooms: dict[int, int], sequences: int | None) -> Question:
    """Bytes are those of formats here, and the runtime works with a little a sequence."""
    held = {context: tables.footprints(context, 16) + 4 for context in rooms}
    return Question(tables, 16, rooms, held, GENERATED, working, sequences)


def working(context: int, sequences: int) -> int:
    """Reading a prompt, or a step of all sequences where that is more."""
    return max(context, 100 * sequences)


def facts(candidates: list[Candidate]) -> list[Any]:
    return [
        (c.number, c.parameters, c.choice.tolist(), c.kl, c.sequences, c.prompt_bytes)
        for c in candidates
    ]


class StoppedError(Exception):
    """As Ctrl-C would, but a test that is not meant to be stopped fails by it."""


class StopsAt:
    """Progress that is interrupted before item ``at``."""

    def __init__(self, at: int) -> None:
        self.at = at

    def track(self, items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == self.at:
                raise StoppedError
            yield item

    def note(self, message: str) -> None:
        self.said = message


def recorded(journal: Path) -> int:
    """Trials in a journal."""
    return journal.read_text().count('"state":')


@pytest.mark.parametrize("sequences", [None, 6])
def test_the_same_seed_gives_the_same_candidates(tables: Tables, sequences: int | None) -> None:
    solver = Solver.of(question(tables, sequences=sequences))
    first = facts(run_study(solver, trials=20, seed=5))
    assert facts(run_study(solver, trials=20, seed=5)) == first
    assert facts(run_study(solver, trials=20, seed=6)) != first


@pytest.fixture(scope="module")
def uninterrupted(tables: Tables) -> list[Any]:
    """A study of 22 trials."""
    return facts(run_study(Solver.of(question(tables)), trials=22, seed=1))


@pytest.mark.parametrize("cut", [1, 5, 14, 20])
def test_a_resumed_study_is_the_uninterrupted_one(
    tables: Tables, uninterrupted: list[Any], tmp_path: Path, cut: int
) -> None:
    """Cut among the trials given, among the random ones, and where Optuna models what it saw."""
    solver, journal = Solver.of(question(tables)), tmp_path / "deep" / "study.journal"
    with pytest.raises(StoppedError):
        run_study(solver, trials=22, seed=1, journal=journal, progress=StopsAt(cut))
    assert facts(run_study(solver, trials=22, seed=1, journal=journal)) == uninterrupted


def test_trials_that_failed_are_remembered_as_such(tables: Tables, tmp_path: Path) -> None:
    tight = question(tables, room=0.2, sequences=3)
    solver = Solver.of(tight)
    whole = run_study(solver, trials=26, seed=1)
    assert 0 < len(whole) < 26
    journal = tmp_path / "study.journal"
    with pytest.raises(StoppedError):
        run_study(solver, trials=26, seed=1, journal=journal, progress=StopsAt(18))
    assert facts(run_study(solver, trials=26, seed=1, journal=journal)) == facts(whole)


def test_a_finished_study_adds_no_trial(tables: Tables, tmp_path: Path) -> None:
    solver, journal = Solver.of(question(tables)), tmp_path / "study.journal"
    first = run_study(solver, trials=12, journal=journal)
    assert facts(run_study(solver, trials=12, journal=journal, progress=StopsAt(0))) == facts(first)
    assert recorded(journal) == 12
    assert len(run_study(solver, trials=15, journal=journal)) == 15


@pytest.mark.parametrize("room", [0.3, 1.0, 4.0])
def test_candidates_fit_the_room_and_say_what_they_take(tables: Tables, room: float) -> None:
    asked = question(tables, room)
    solver = Solver.of(asked)
    candidates = run_study(solver, trials=20)
    assert candidates
    for candidate in candidates:
        each = candidate.prompt_bytes + GENERATED
        taken = candidate.sequences * each + working(256, candidate.sequences)
        assert taken <= asked.rooms[256]
        assert solver.policy(candidate).footprint(256, 16) == candidate.prompt_bytes
        assert candidate.prompt_bytes <= asked.prompt_budget(256, candidate.sequences)


def test_candidates_are_judged_on_the_selection_samples(tables: Tables) -> None:
    solver = Solver.of(question(tables))
    judges = tables.of_split("select")
    for candidate in run_study(solver, trials=6):
        expected = judges.sample_weights() @ judges.by_sample(candidate.choice)
        assert candidate.kl == pytest.approx(float(expected))
    alone = tables.of_split("search")
    unjudged = Solver.of(question(alone))
    assert [s.split for s in unjudged.check.samples] == ["search", "search"]


def test_held_out_samples_change_nothing(tables: Tables) -> None:
    rows = [row for row, s in enumerate(tables.samples) if s.split != "evaluate"]
    without = run_study(Solver.of(question(tables.subset(rows))), trials=10)
    assert facts(without) == facts(run_study(Solver.of(question(tables)), trials=10))


def test_a_trials_parameters_are_kept_to(tables: Tables) -> None:
    solver = Solver.of(question(tables, room=2.0))
    common = {"context": 256, "sequences": 4, "shrinkage": 0.4}
    parameters = {"h2o": False, "streaming_llm": True, "least_bits": 4, "split": "layers"}
    candidate = solver.answer(0, {**parameters, **common})
    assert candidate is not None
    options = [tables.options[o] for o in candidate.choice]
    for option in options:
        assert option.method.name != "h2o"
        assert "2" not in option.keys.label
    rows = candidate.choice.reshape(3, 2)
    assert (rows[:, 0] == rows[:, 1]).all()


def test_most_sequences_fit_and_one_more_does_not(tables: Tables) -> None:
    for room in (0.1, 1.0, 7.3):
        asked = question(tables, room)
        most = asked.most_sequences(256)
        smallest = int(asked.held[256].min()) * tables.heads
        assert asked.prompt_budget(256, most) >= smallest
        assert asked.prompt_budget(256, most + 1) < smallest


@pytest.mark.parametrize("sequences", [None, 2])
def test_where_nothing_fits_there_are_no_candidates(
    tables: Tables, tmp_path: Path, sequences: int | None
) -> None:
    solver = Solver.of(asked_of(tables, {256: 3000}, sequences))
    assert run_study(solver, trials=6, journal=tmp_path / "study.journal") == []
    assert run_study(solver, trials=6, journal=tmp_path / "study.journal") == []


def test_a_plan_that_may_wait_leaves_room_for_one_prompt_uncompressed(tables: Tables) -> None:
    """One of three options' methods is KVzip; a trial that leaves it out has the whole room."""
    renamed = tuple(
        replace(option, method=KVzip()) if isinstance(option.method, StreamingLLM) else option
        for option in tables.options
    )
    asked = question(replace(tables, options=renamed), room=1.2)
    waiting = FULL_PROMPT * (tables.layers - 1) // tables.layers
    assert asked.prompt_budget(256, 1) - asked.prompt_budget(256, 1, waits=True) == waiting
    solver = Solver.of(asked)
    parameters = {
        "least_bits": 2, "split": "heads", "shrinkage": 0.2, "context": 256, "sequences": 1,
    }  # fmt: skip
    with_it, without = (
        solver.answer(0, {**parameters, "kvzip": allowed}) for allowed in (True, False)
    )
    assert with_it is not None
    assert without is not None
    assert with_it.prompt_bytes <= asked.rooms[256] - waiting < without.prompt_bytes


# The context as a choice


def several(tables: Tables, sequences: int | None = None) -> Question:
    """Longer prompts leave a little less room, as their prefill takes more."""
    rooms = {context: int(3 * FULL_PROMPT - 10 * context) for context in (256, 512, 1024)}
    return asked_of(tables, rooms, sequences)


@pytest.mark.parametrize("sequences", [None, 3])
def test_the_study_tries_every_context_and_stays_within_its_room(
    tables: Tables, sequences: int | None
) -> None:
    asked = several(tables, sequences)
    solver = Solver.of(asked)
    candidates = run_study(solver, trials=30)
    assert {c.context for c in candidates} == set(asked.contexts)
    for candidate in candidates:
        assert candidate.parameters["context"] == candidate.context
        each = candidate.prompt_bytes + GENERATED
        taken = candidate.sequences * each + working(candidate.context, candidate.sequences)
        assert taken <= asked.rooms[candidate.context]
        assert solver.policy(candidate).footprint(candidate.context, 16) == candidate.prompt_bytes
        assert sequences in (None, candidate.sequences)


def test_a_longer_context_loses_more_at_as_many_sequences(tables: Tables) -> None:
    solver = Solver.of(several(tables))
    given_ = {"least_bits": 2, "split": "heads", "shrinkage": 0.0, "sequences": 4}
    losses = []
    for context in (256, 512, 1024):
        candidate = solver.answer(0, {**given_, "context": context})
        assert candidate is not None
        losses.append(solver.problems[context].shrunk(0.0).value(candidate.choice))
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_a_study_of_contexts_resumes_as_if_uninterrupted(tables: Tables, tmp_path: Path) -> None:
    solver, journal = Solver.of(several(tables)), tmp_path / "study.journal"
    whole = run_study(solver, trials=24, seed=2)
    with pytest.raises(StoppedError):
        run_study(solver, trials=24, seed=2, journal=journal, progress=StopsAt(19))
    assert facts(run_study(solver, trials=24, seed=2, journal=journal)) == facts(whole)


# The front


def candidate(number: int, kl: float, sequences: int) -> Candidate:
    return Candidate(number, {}, np.zeros(1, int), kl, 1024, sequences, 0)


points = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=20)


@settings(deadline=None, derandomize=True)
@given(points)
def test_the_front_holds_exactly_what_nothing_beats(given_: list[tuple[int, int]]) -> None:
    candidates = [candidate(n, kl / 10, sequences) for n, (kl, sequences) in enumerate(given_)]
    found = front(candidates)
    assert {(c.kl, c.sequences) for c in found} == {
        (c.kl, c.sequences)
        for c in candidates
        if not any(
            o.kl <= c.kl
            and o.sequences >= c.sequences
            and (o.kl, o.sequences) != (c.kl, c.sequences)
            for o in candidates
        )
    }
    assert [c.sequences for c in found] == sorted({c.sequences for c in found})
    assert [c.kl for c in found] == sorted({c.kl for c in found})


@settings(deadline=None, derandomize=True)
@given(points, st.integers(0, 10))
def test_the_pick_has_most_sequences_within_the_limit(
    given_: list[tuple[int, int]], limit: int
) -> None:
    candidates = [candidate(n, kl / 10, sequences) for n, (kl, sequences) in enumerate(given_)]
    chosen = pick(front(candidates), limit / 10)
    within = [c for c in candidates if c.kl <= limit / 10]
    if within:
        assert chosen.kl <= limit / 10
        assert chosen.sequences == max(c.sequences for c in within)
    else:
        assert chosen.kl == min(c.kl for c in candidates)


def test_a_published_pattern_starts_a_search_and_is_improved(
    tables: Tables, tmp_path: Path
) -> None:
    """Half of the heads keep everything, the others sinks and a window, as DuoAttention does."""
    from kvtune.policies.option import Budget, Option
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument, write_policy
    from kvtune.tuner.starts import nearest_choice, start_points

    window = Option(StreamingLLM(), Budget(tokens=40))
    pattern = Policy("duo", ((Option(), window), (window, Option()), (window, window)))
    file = tmp_path / "duo.yaml"
    file.write_text(write_policy(PolicyDocument(pattern, ModelFacts("any", 3, 2, 16))))
    solver = Solver.of(question(tables))
    choice = nearest_choice(pattern, solver.question)
    chosen = [tables.options[o] for o in choice]
    assert [o.method.name for o in chosen] == [
        "full", "streaming_llm", "streaming_llm", "full", "streaming_llm", "streaming_llm",
    ]  # fmt: skip
    assert {o.budget.resolve(256) for o in chosen if o.method.name != "full"} == {32}
    as_it_is, improved = start_points(solver, [file], first=7)
    assert (as_it_is.number, improved.number) == (7, 8)
    assert improved.sequences == as_it_is.sequences
    assert improved.kl < as_it_is.kl
    assert solver.problems[256].spent(improved.choice) <= solver.question.prompt_budget(
        256, improved.sequences
    )
    # It reads its whole cache on the device, and brings nothing over from the host.
    with_host = Solver.of(replace(question(tables), most_moved=1))
    assert [each.choice.tolist() for each in start_points(with_host, [file], first=7)] == [
        choice.tolist()
    ]
    reads_little = Solver.of(replace(question(tables), most_read=1))
    assert not start_points(reads_little, [file], first=7)
