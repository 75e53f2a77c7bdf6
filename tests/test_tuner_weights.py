"""The format of the weights as a choice: what it frees is counted, what it loses is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.simulator.memory.weights import listed_formats
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tuner.candidate import Candidate, front, pick
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.question import Question
from kvtune.tuner.search import run_search
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.stagnation import hypervolume
from kvtune.tuner.study import run_study

pytestmark = pytest.mark.usefixtures("one_thread")

FULL_PROMPT = 2 * 2 * 256 * 16 * 6
FREED = {"bf16": 0, "int8": 2 * FULL_PROMPT, "int4": 3 * FULL_PROMPT}
Make = Callable[..., Tables]


def question(tables: Tables, sequences: int | None = None) -> Question:
    """Room for two uncompressed prompts beside bf16 weights, for four and five beside others."""
    held = {256: tables.footprints(256, 16) + 4}
    rooms = {256: 2 * FULL_PROMPT}
    return Question(tables, 16, rooms, held, 4096, lambda *_: 0, sequences, freed=FREED)


def test_every_format_is_tried_and_kept_within_its_own_room(make_tables: Make) -> None:
    asked = question(make_tables())
    candidates = run_study(Solver.of(asked), trials=24)
    assert {c.weights for c in candidates} == set(FREED)
    for candidate in candidates:
        taken = candidate.sequences * (candidate.prompt_bytes + 4096)
        assert taken <= asked.rooms[256] + FREED[candidate.weights]
        assert candidate.parameters["weights"] == candidate.weights
        assert candidate.freed_bytes == FREED[candidate.weights]


def test_a_plan_for_wide_weights_is_on_the_front_though_narrow_ones_serve_more(
    make_tables: Make,
) -> None:
    candidates = run_study(Solver.of(question(make_tables())), trials=24)
    most = {name: max(c.sequences for c in candidates if c.weights == name) for name in FREED}
    assert most["bf16"] < most["int8"] < most["int4"]
    assert {c.weights for c in front(candidates)} == set(FREED)
    alone = [c for c in candidates if c.weights == "bf16"]
    assert [c for c in front(candidates) if c.weights == "bf16"] == front(alone)


def test_at_a_fixed_batch_freed_bytes_are_spent_on_less_loss(make_tables: Make) -> None:
    asked = question(make_tables(), sequences=6)
    assert asked.objectives == ("minimize", "minimize")
    candidates = run_study(Solver.of(asked), trials=24)
    least = {name: min(c.kl for c in candidates if c.weights == name) for name in FREED}
    assert least["bf16"] > least["int8"] > least["int4"]


def test_options_for_all_heads_are_offered_with_every_format(make_tables: Make) -> None:
    found = simple_points(Solver.of(question(make_tables())), first=7)
    assert [c.number for c in found] == list(range(7, 7 + len(found)))
    seated = {(c.parameters["uniform"], c.weights): c.sequences for c in found}
    for option in {label for label, _ in seated}:
        most = [seated.get((option, name), 0) for name in FREED]
        assert most == sorted(most), "the widest leaves the least room"
        assert most[0] < most[-1]


def test_a_study_of_formats_resumes_as_if_uninterrupted(make_tables: Make, tmp_path: Path) -> None:
    solver, journal = Solver.of(question(make_tables())), tmp_path / "study.journal"
    whole = run_study(solver, trials=22, seed=3)
    run_study(solver, trials=17, seed=3, journal=journal)
    again = run_study(solver, trials=22, seed=3, journal=journal)
    assert [(c.parameters, c.kl) for c in again] == [(c.parameters, c.kl) for c in whole]


def point(weights: str, kl: float, sequences: int) -> Candidate:
    choice, freed = np.zeros(1, int), FREED[weights]
    return Candidate(0, {}, choice, kl, 256, sequences, 0, weights=weights, freed_bytes=freed)


def test_the_pick_has_the_widest_weights_that_do_what_is_asked() -> None:
    wide, narrow = point("bf16", 0.015, 3), point("int4", 0.001, 9)
    assert pick(front([narrow, wide]), 0.02) is wide
    assert pick(front([narrow, wide]), 0.01) is narrow
    assert pick(front([narrow, wide]), 0.0001) is narrow, "none is within: the least loss"
    more = point("bf16", 0.019, 4)
    assert pick(front([narrow, wide, more]), 0.02) is more


def test_fronts_of_formats_cover_each_for_itself() -> None:
    wide, narrow = [point("bf16", 0.1, 4), point("bf16", 0.2, 9)], [point("int4", 0.05, 20)]
    both = hypervolume([*wide, *narrow], 0.5)
    assert both == pytest.approx(hypervolume(wide, 0.5) + hypervolume(narrow, 0.5))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("auto", ("auto",)),
        ("any", ("bf16", "fp8", "int4")),
        ("int4, BF16", ("bf16", "int4")),
        ("q8_0,bf16,q8_0", ("bf16", "q8_0")),
    ],
)
def test_formats_are_listed_largest_first(asked: str, found: tuple[str, ...]) -> None:
    assert listed_formats(asked, find_model("llama-8b"), find_gpu("4090")) == found


def test_any_on_a_card_without_fp8_has_int8() -> None:
    assert listed_formats("any", find_model("llama-8b"), find_gpu("3090"))[1] == "int8"


@pytest.mark.parametrize("asked", ["bf17", "bf16,,int4", "any,bf16", ""])
def test_what_is_no_list_of_formats_is_refused(asked: str) -> None:
    with pytest.raises(KvtuneError, match=r"is no weight format|any stands alone"):
        listed_formats(asked, find_model("llama-8b"), find_gpu("4090"))


def test_a_search_answers_with_every_format_and_picks_the_widest(
    packaged: Tables, tmp_path: Path
) -> None:
    alone = run_search(llama(tmp_path / "fp8", weights="fp8"))
    result = run_search(llama(tmp_path / "any", weights="any"))
    assert result.budget.weight_format == "fp8", "bf16 ones leave no room for a cache in 16 GB"
    assert any("bf16 leave no room" in note for note in result.notes)
    assert any("what narrower weights lose is not known" in note for note in result.notes)
    chosen = next(p for p in result.front if p.chosen)
    assert (result.sequences, result.policy) == (alone.sequences, alone.policy)
    assert {p.weights for p in result.front} == {"fp8", "int4"}
    assert max(p.sequences for p in result.front if p.weights == "int4") > chosen.sequences
    stored = json.loads((tmp_path / "any" / "result.json").read_text())
    assert {p["weights"] for p in stored["front"]} == {"fp8", "int4"}


def test_each_format_has_its_own_bytes_and_times(packaged: Tables, tmp_path: Path) -> None:
    """Of every point the figures are those of a search with its format alone."""
    request = llama(tmp_path / "any", weights="any", sequences=4)
    found = run_search(request).front
    assert {p.weights for p in found} == {"fp8", "int4"}
    for name in ("fp8", "int4"):
        alone = run_search(replace(request, weights=name, run_dir=tmp_path / name)).front
        known = {p.parameters["uniform"]: p for p in alone}
        same = [p for p in found if p.weights == name and p.parameters["uniform"] in known]
        assert same
        for p in same:
            assert p.time_per_token == known[p.parameters["uniform"]].time_per_token
            assert p.kl == known[p.parameters["uniform"]].kl


def test_the_explorer_shows_each_plan_with_its_own_weights(
    packaged: Tables, tmp_path: Path
) -> None:
    result = run_search(llama(tmp_path, weights="any"))
    study = StudyReader(tmp_path).read()
    figures = figures_of(study, Setting.asked(study.facts))
    assert study.chosen is not None
    assert figures.weights[study.chosen] == "fp8"
    assert figures.budget(study.chosen).cache_bytes == result.budget.cache_bytes
    assert figures.estimate("step_s", study.chosen).value == pytest.approx(result.latency.value)
    served = study.document(study.plans[study.chosen], study.facts.weights).serving
    assert served is not None
    assert served.weights == "fp8"
    alone = figures_of(study, replace(Setting.asked(study.facts), weights="int4"))
    rows = np.flatnonzero(study.weights == "int4")
    assert len(rows)
    assert figures.memory[rows] == pytest.approx(alone.memory[rows])
    assert figures.step_s[rows] == pytest.approx(alone.step_s[rows])
    running = replace(study, outcome=None).chosen
    assert running is not None
    assert study.weights[running] == "fp8", "the widest, while the search still runs too"
