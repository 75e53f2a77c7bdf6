"""Hard limits are kept to by the printed figures, and an error names a limit that works."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.units import parse_seconds
from kvtune.simulator.cost import one_after_the_other
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tests.tiers import first
from kvtune.tuner.candidate import Candidate, front
from kvtune.tuner.checks import check_request
from kvtune.tuner.limits import Limits, _rounded_up, none_within
from kvtune.tuner.question import Question
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.samplers import Sampler, choose
from kvtune.tuner.search import run_search
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.stagnation import hypervolume, stagnates
from kvtune.tuner.study import run_study

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_plan_that_is_printed_keeps_to_the_limit_on_what_is_printed(
    packaged: Tables, tmp_path: Path
) -> None:
    free = run_search(llama(tmp_path / "free"))
    limit = 0.97 * free.latency.value
    kept = run_search(llama(tmp_path / "kept", limits=Limits(time_per_token_s=limit)))
    assert kept.latency.value <= limit
    assert kept.sequences < free.sequences
    assert all(point.time_per_token.value <= limit for point in kept.front)


def test_the_error_names_limits_that_work(packaged: Tables, tmp_path: Path) -> None:
    free = run_search(llama(tmp_path / "free"))
    first = one_after_the_other(free.prefill, free.compression).value
    tight = Limits(first_token_s=0.2 * first, sequences=free.sequences)
    with pytest.raises(DoesNotFitError, match="the nearest misses --ttft by") as caught:
        run_search(llama(tmp_path / "tight", limits=tight))
    assert re.search(r"KL \S+ to \S+ nats", caught.value.hint or ""), "a stand-in's are bands"
    quoted = re.search(r"--ttft (\S+)", caught.value.hint or "")
    assert quoted is not None
    works = replace(tight, first_token_s=parse_seconds(quoted[1]))
    found = run_search(llama(tmp_path / "works", limits=works))
    assert one_after_the_other(found.prefill, found.compression).value <= parse_seconds(quoted[1])
    assert found.sequences >= free.sequences


def test_the_way_out_is_a_plan_that_loses_what_is_accepted() -> None:
    def tried(kl: float, beyond: float) -> Candidate:
        uniform, choice = {"uniform": "full all int4"}, np.zeros(4, np.int64)
        return Candidate(0, uniform, choice, kl, 8192, 4, 2**20, {"--tpot": beyond})

    def refused(*candidates: Candidate, band: Estimate | None = None) -> DoesNotFitError:
        return none_within(Limits(time_per_token_s=0.010), candidates, 0.02, lambda _: band)

    near, far = tried(2.0, 0.1), tried(0.01, 0.5)
    assert "--tpot 15ms has a plan" in (refused(near, far).hint or "")
    assert refused(near, far).message.endswith("the nearest misses --tpot by 10 %"), "of all"
    told = refused(near).hint or ""
    assert "--tpot 11ms has a plan" in told
    assert told.endswith("KL 2 nats a token, more than --max-kl 0.02.")
    stand_in = Estimate(0.01, 0.004, 0.09, "nats/token", BAND)
    assert "KL 0.004 to 0.09 nats a token." in (refused(far, band=stand_in).hint or "")


def test_a_number_at_once_below_its_own_limit_is_refused_before_anything_is_run(
    tmp_path: Path,
) -> None:
    asked = llama(tmp_path / "run", sequences=17, limits=Limits(sequences=30))
    with pytest.raises(KvtuneError, match="--sequences 30 asks for more") as caught:
        run_search(asked)
    assert not isinstance(caught.value, DoesNotFitError)
    assert "--batch 30" in (caught.value.hint or "")
    assert not asked.run_dir.exists()
    check_request(replace(asked, sequences=30))
    check_request(replace(asked, sequences=None))


@given(st.floats(1e-3, 1e6))
def test_a_quoted_limit_is_never_below_the_figure_and_hardly_above(number: float) -> None:
    assert number * (1 - 1e-9) <= _rounded_up(number) <= number * 1.011


def study_of(tables: Tables, most: int) -> Solver:
    """Room for three uncompressed prompts; limits at most so many sequences."""
    size = 2 * 2 * 256 * 16 * tables.heads

    def excess(candidate: Candidate) -> dict[str, float]:
        return {"--tpot": candidate.sequences / most - 1}

    held = {256: tables.footprints(256, 16)}
    return Solver.of(Question(tables, 16, {256: 3 * size}, held, 0, lambda *_: 0, excess=excess))


def test_plans_beyond_a_limit_carry_by_how_much(make_tables: Callable[..., Tables]) -> None:
    candidates = run_study(study_of(make_tables(), 5), trials=20)
    beyond = [each for each in candidates if each.sequences > 5]
    assert beyond
    for each in candidates:
        assert each.misses == ({"--tpot": each.sequences / 5 - 1} if each.sequences > 5 else {})


def test_the_sampler_is_drawn_to_plans_within_the_limits(
    make_tables: Callable[..., Tables],
) -> None:
    solver = study_of(make_tables(), 3)
    drawn = [each.sequences for each in run_study(solver, trials=40, sampler="tpe")][20:]
    random = [each.sequences for each in run_study(solver, trials=40, sampler="random")][20:]
    assert np.mean(np.array(drawn) <= 3) > np.mean(np.array(random) <= 3)


def test_plans_with_one_option_serve_as_many_as_time_allows(
    make_tables: Callable[..., Tables],
) -> None:
    tables = make_tables()
    free = simple_points(study_of(tables, 10**6), first=0)
    kept = simple_points(study_of(tables, 5), first=0)
    assert [each.sequences for each in kept] == [min(each.sequences, 5) for each in free]


@pytest.mark.parametrize("sampler", first(get_args(Sampler)))
def test_any_sampler_resumes_as_if_uninterrupted(
    make_tables: Callable[..., Tables], tmp_path: Path, sampler: str
) -> None:
    """After what the sampler draws at random: a population, or TPE's first trials."""
    solver, journal = study_of(make_tables(), 5), tmp_path / "study.journal"
    stopped, trials = (61, 70) if sampler == "nsga2" else (25, 30)
    whole = run_study(solver, trials=trials, sampler=sampler)  # type: ignore[arg-type]
    run_study(solver, trials=stopped, sampler=sampler, journal=journal)  # type: ignore[arg-type]
    again = run_study(solver, trials=trials, sampler=sampler, journal=journal)  # type: ignore[arg-type]
    assert [each.parameters for each in again] == [each.parameters for each in whole]


def test_the_choice_of_a_sampler_has_a_reason() -> None:
    assert choose(None, 60).name == "tpe"
    assert choose(None, 5000).name == "nsga2"
    assert choose("random", 60).reason == "asked for"


@dataclass(frozen=True)
class Point:
    kl: float
    tokens_at_once: int
    weights: str = "bf16"
    misses: Mapping[str, float] = field(default_factory=dict)


def brute(points: Sequence[Point], worst: float) -> float:
    """Area under the staircase, by a fine grid over the logarithm of tokens."""
    grid = np.linspace(0, max(np.log(p.tokens_at_once) for p in points), 20001)
    least = [
        min([p.kl for p in points if np.log(p.tokens_at_once) >= x - 1e-12], default=worst)
        for x in grid[1:]
    ]
    return float(np.maximum(worst - np.array(least), 0).sum() * (grid[1] - grid[0]))


def test_hypervolume_is_the_area_under_the_staircase() -> None:
    points = [Point(0.1, 100), Point(0.02, 20), Point(0.05, 10), Point(0.4, 5000), Point(0.9, 9000)]
    assert hypervolume(points, 0.5) == pytest.approx(brute(points, 0.5), rel=1e-3)


def test_a_front_that_stopped_growing_stops_the_study() -> None:
    first = [Point(0.5, 10), Point(0.1, 100)]
    same = [Point(0.2, 50)] * 40
    assert stagnates([*first, *same])
    assert not stagnates([*first, *same[:20]])
    assert not stagnates([*first, *same[:39], Point(0.05, 200)])


def test_plans_beyond_a_limit_do_not_stop_a_study_nor_hide_what_it_finds() -> None:
    beyond = Point(0.001, 10**6, misses={"--tpot": 0.5})
    first, same = [Point(0.5, 10), Point(0.1, 100)], [Point(0.2, 50)] * 39
    assert not stagnates([beyond] * 60), "there is nothing yet to keep"
    assert stagnates([*first, *same, beyond]), "what misses a limit adds nothing"
    assert not stagnates([beyond, *first, *same, Point(0.05, 200)]), "and covers nothing"


def test_a_trial_that_cannot_fit_says_how_far_it_misses(
    make_tables: Callable[..., Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtune.tuner import study

    tables, seen = make_tables(), {}
    solver = Solver.of(replace(study_of(tables, 10**6).question, sequences=3))
    tight = replace(solver, question=replace(solver.question, rooms={256: 8_000}))
    told = study._tell_limits

    def watched(asked: Any, candidate: Candidate | None, solver: Solver) -> None:
        told(asked, candidate, solver)
        if candidate is None:
            seen[asked[0].number] = asked[0].constraints[study.ROOM], asked[1]

    monkeypatch.setattr(study, "_tell_limits", watched)
    found = run_study(tight, trials=30, sampler="random")
    assert seen
    assert not {each.number for each in found} & set(seen)
    for by, parameters in seen.values():
        columns = tight._columns(parameters)
        least = tables.heads * int(tight.problems[256].footprint[columns].min())
        assert by == pytest.approx(1 - (8_000 // 3) / least)
        assert by > 0


def test_the_front_is_of_plans_within_the_limits(make_tables: Callable[..., Tables]) -> None:
    solver = study_of(make_tables(), 5)
    kept = [each for each in run_study(solver, trials=20) if not each.misses]
    assert max(each.sequences for each in front(kept)) <= 5


def test_the_smallest_card_that_does_what_is_asked_is_found(
    packaged: Tables, tmp_path: Path
) -> None:
    from kvtune.common.progress import Silent
    from kvtune.profiles.gpus import find_gpu
    from kvtune.tuner.which_gpu import smallest_gpu

    def on(name: str) -> SearchRequest:
        card = find_gpu(name)
        changes = {"gpu": card, "memory_bytes": card.visible_bytes, "weights": "bf16"}
        return llama(tmp_path / name, limits=Limits(sequences=4), **changes)

    tried, result = smallest_gpu([on("h100"), on("4090"), on("a40"), on("4060")], Silent())
    assert [each.works for each in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[-1].gpu == result.request.gpu.slug
    assert result.sequences >= 4
    assert result.quality.kl.value <= result.request.largest_kl
    memory = [each.memory_bytes for each in tried]
    assert memory == sorted(memory)
    with pytest.raises(DoesNotFitError, match="none of 1 cards"):
        smallest_gpu([on("4060")], Silent())


def test_under_one_limit_the_smaller_card_is_tried_first(tmp_path: Path) -> None:
    from kvtune.profiles.gpus import find_gpu
    from kvtune.tuner.which_gpu import _size

    asked = [llama(tmp_path / name, gpu=find_gpu(name)) for name in ("h100", "4090", "l4")]
    assert len({each.memory_bytes for each in asked}) == 1
    assert [each.gpu.slug for each in sorted(asked, key=_size)] == ["l4", "rtx-4090", "h100-sxm"]
