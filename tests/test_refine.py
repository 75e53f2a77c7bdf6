"""Live rounds: predictions learn from what was run, and what is chosen has been run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike

from kvtune.policies.allocators.model_wide import ModelWide
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.option import Budget, Option
from kvtune.simulator.quality.calibration import NONE
from kvtune.simulator.quality.levels import (
    KIND_TEXTS,
    TRUST,
    Seen,
    levels_of,
    usual_spread,
)
from kvtune.simulator.quality.rules import Rule
from kvtune.simulator.quality.tables import Tables
from kvtune.tests.made_up import llama
from kvtune.tuner.answer import Found
from kvtune.tuner.candidate import Candidate, front, pick
from kvtune.tuner.head_points import BY_HEADS, head_points
from kvtune.tuner.question import Question
from kvtune.tuner.refine import FINALISTS, ROUNDS, recalibrated, refine
from kvtune.tuner.solver import Solver, evicts
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.stand_in_rules import Offer, rule_points


@pytest.fixture
def found(make_tables: Callable[..., Tables], tmp_path: Path) -> Found:
    """A study of plans at several sizes, most tokens at once with the most loss."""
    tables = make_tables(layers=4, kv_heads=3, count=12)
    held = {256: tables.footprints(256, tables.head_dim)}
    solver = Solver.of(Question(tables, tables.head_dim, {256: 10**6}, held, 0, lambda *_: 0))
    source = QualitySource(tables, NONE)
    candidates = []
    for number, sequences in enumerate((2, 3, 4, 6, 8, 12, 16)):
        parameters = {"context": 256, "sequences": sequences, "shrinkage": 0.0, "split": "heads"}
        answer = solver.answer(number, {**parameters, "least_bits": 2})
        assert answer is not None
        candidates.append(answer)
    request = llama(tmp_path, largest_kl=float(np.median([c.kl for c in candidates])) * 1.01)
    return recalibrated(Found(request, {}, source, solver, "", candidates, ()), NONE)


class Model:
    """Loses so many times what the tables say of a kind of text; counts what is asked."""

    def __init__(self, found: Found, times: dict[str, float]) -> None:
        self.source, self.times = found.source, times
        self.asked: list[Candidate] = []

    def __call__(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        self.asked += candidates
        return [self.lives(each) for each in candidates]

    def lives(self, candidate: Candidate) -> list[float]:
        losses, kinds = self.source.expected(candidate.choice, "select")
        return [self.times[kind] * loss for loss, kind in zip(losses, kinds, strict=True)]


def everywhere(found: Found, loss: float) -> list[float]:
    """The same live loss on every selection sample."""
    return [loss] * len(found.source.tables.of_split("select").samples)


def kinds_of(found: Found) -> list[str]:
    return sorted({sample.kind for sample in found.source.tables.samples})


def test_a_model_that_loses_more_is_given_more_room(found: Found) -> None:
    model = Model(found, dict.fromkeys(kinds_of(found), 4.0))
    ended, chosen = refine(found, model)
    before = pick(front(found.expected), found.request.largest_kl)
    assert chosen.tokens_at_once < before.tokens_at_once
    assert chosen.choice.tobytes() in {each.choice.tobytes() for each in model.asked}
    assert chosen.kl <= found.request.largest_kl
    assert ended.source.calibration.runs == len(model.asked) <= FINALISTS + ROUNDS - 1


def test_what_kinds_have_in_common_moves_all_predictions_by_as_much_as_is_trusted(
    found: Found,
) -> None:
    """One kind loses what was predicted and one nine times that: in the middle it is three."""
    times = dict(zip(kinds_of(found), (1.0, 9.0), strict=True))
    ended, chosen = refine(found, Model(found, times))
    before = found.source.by_kind(chosen.choice)
    after = ended.source.by_kind(chosen.choice)
    for kind, loss in before.items():
        assert after[kind] == pytest.approx(3.0**TRUST * loss, rel=1e-6)


def seen(kinds: str, calibrated: ArrayLike, live: ArrayLike) -> Seen:
    return Seen(tuple(kinds.split()), np.array(calibrated, float), np.array(live, float))


def test_of_policies_that_lose_nothing_or_never_ran_no_level_is_known() -> None:
    nothing = seen("prose", [0.0], [0.1]), seen("prose", [0.1], [0.0])
    assert levels_of([], 0.2) is levels_of(nothing, 0.2) is None
    found = levels_of([seen("prose", [0.1], [0.2]), seen("prose", [0.1], [0.1])], 0.2)
    assert found is not None
    assert found.of("prose") == found.of("code") == pytest.approx(TRUST * np.log(2) / 2)


def test_a_kind_is_believed_apart_from_others_as_far_as_its_texts_are_many() -> None:
    kinds, live = ("prose", "code", "chat"), np.array([1.0, 2.0, 8.0])

    def apart(texts: int) -> Mapping[str, float]:
        every = " ".join(np.repeat(kinds, texts))
        found = levels_of([seen(every, np.ones(3 * texts), np.repeat(live, texts))], 0.2)
        assert found is not None
        return found.apart

    few, many = apart(1), apart(500)
    assert few["code"] == many["code"] == 0  # the median
    assert few["chat"] == pytest.approx(np.log(4) / (1 + KIND_TEXTS))
    assert many["chat"] == pytest.approx(np.log(4), rel=0.02)
    assert many["prose"] == pytest.approx(-np.log(2), rel=0.02)


def test_a_kind_whose_texts_differ_has_a_wider_interval_and_a_usual_spread_stands_in() -> None:
    kinds = "prose prose prose prose code code code code"
    live = [1.0, 1.01, 0.99, 1.0, 0.5, 2.0, 0.7, 1.5]
    found = levels_of([seen(kinds, [1.0] * 8, live)], 0.3)
    assert found is not None
    assert found.spreads["prose"] < found.spread < found.spreads["code"]
    for usual in (0.1, 0.4):  # one text of one kind says nothing of spreads
        alone = levels_of([seen("prose", [1.0], [1.2])], usual)
        assert alone is not None
        assert alone.spreads["prose"] == alone.spread == pytest.approx(usual)


def test_the_usual_spread_is_that_between_texts_and_not_between_kinds_or_plans() -> None:
    rng = np.random.default_rng(0)
    groups = []
    for level in (0.0, 1.0):
        texts = level + rng.normal(0, 0.25, 400)
        kinds = " ".join(["prose", "code"] * 200)
        groups.append([
            seen(kinds, np.ones(400), np.exp(texts + plan + np.tile([0.0, 2.0], 200)))
            for plan in (0.0, 0.7)
        ])  # fmt: skip
    assert usual_spread(groups) == pytest.approx(0.25, rel=0.05)
    assert usual_spread([[seen("prose", [1.0], [2.0])]]) == 0


def test_a_model_that_does_as_predicted_changes_nothing(found: Found) -> None:
    model = Model(found, dict.fromkeys(kinds_of(found), 1.0))
    ended, chosen = refine(found, model)
    assert chosen.choice.tobytes() == model.asked[0].choice.tobytes()
    assert [c.kl for c in ended.expected] == pytest.approx([c.kl for c in found.expected])


def test_of_the_finalists_that_with_the_least_live_loss_is_taken(found: Found) -> None:
    """Two plans of the same size: the one that is predicted to be worse is better live."""
    request = replace(found.request, largest_kl=10.0)
    best = pick(front(found.expected), request.largest_kl)
    options = np.arange(len(found.source.tables.options))
    choice = best.choice.copy()
    choice[0] = max(options, key=lambda o: found.source.tables.loss[:, 0, o].mean())
    other = replace(best, number=99, choice=choice)
    both = replace(found, request=request, expected=[*found.expected, other])
    both = recalibrated(both, NONE)
    assert pick(front(both.expected), request.largest_kl).number == best.number

    def run(candidates: Sequence[Candidate]) -> list[list[float]]:
        return [everywhere(found, 0.01 if c.number == 99 else 0.02) for c in candidates]

    assert refine(both, run)[1].number == 99


def test_plans_that_follow_head_scores_keep_to_the_bytes_and_favour_high_scores(
    found: Found,
) -> None:
    tables, solver = found.source.tables, found.solver
    scores = np.random.default_rng(5).random((4, 3)).astype(np.float32)
    beside = found.expected[2]
    points = head_points(solver, scores, beside, first=50)
    assert [(each.number, each.parameters[BY_HEADS]) for each in points] == [
        (50, "full"),
        (51, "pool"),
    ]
    budget = solver.question.prompt_budget(256, beside.sequences)
    rank = np.argsort(-scores.ravel())
    for each in points:
        taken = solver.question.held[256][each.choice]
        assert taken.sum() <= budget
        assert taken[rank[:3]].mean() >= taken[rank[-3:]].mean()
        assert (each.context, each.sequences) == (beside.context, beside.sequences)
    full = points[0].choice
    assert not any(evicts(tables.options[option]) for option in full[rank[:1]])


def test_plans_that_follow_head_scores_run_whatever_is_predicted_and_win_where_they_are_better(
    found: Found,
) -> None:
    request = replace(found.request, largest_kl=10.0)
    best = pick(front(found.expected), request.largest_kl)
    worst = int(np.argmax([o.footprint(16, 256, 64) for o in found.source.tables.options]))
    others = []
    for number in range(FINALISTS + 2):
        choice = best.choice.copy()
        choice[number] = (choice[number] + 1) % len(found.source.tables.options)
        others.append(replace(best, number=60 + number, choice=choice))
    by_heads = replace(
        best,
        number=99,
        choice=np.full_like(best.choice, worst),
        parameters={BY_HEADS: "full", "context": best.context, "sequences": best.sequences},
    )
    both = replace(found, request=request, expected=[*found.expected, *others, by_heads])

    def run(candidates: Sequence[Candidate]) -> list[list[float]]:
        return [
            everywhere(found, 1e-6 if BY_HEADS in each.parameters else 1.0) for each in candidates
        ]

    _, chosen = refine(recalibrated(both, NONE), run)
    assert chosen.number == 99


def with_a_rule(found: Found, loss: float) -> Found:
    """KVzip with one budget over the model beside the plans of a study."""
    best = pick(front(found.expected), found.request.largest_kl)
    losses = np.full(len(found.source.tables.samples), loss, np.float32)
    option = Option(KVzip(), Budget(share=0.25), Int4(), Int4())
    source = found.source.with_rules([Rule("kvzip", option, ModelWide(), losses)])
    question = found.solver.question
    held = {context: np.append(each, each.min()) for context, each in question.held.items()}
    solver = found.solver.asked(replace(question, tables=source.tables, held=held))
    offer = Offer(source.tables.rules[0], best.context, best.sequences, best.weights)
    (point,) = rule_points(solver, [offer], first=99)
    both = replace(found, source=source, solver=solver, expected=[*found.expected, point])
    return recalibrated(both, NONE)


@pytest.mark.parametrize(("live", "wins"), [(1e-6, True), (5.0, False)])
def test_a_rule_runs_whatever_is_predicted_and_is_the_plan_where_it_is_better(
    found: Found, live: float, wins: bool
) -> None:
    both = with_a_rule(found, loss=9.0)

    def run(candidates: Sequence[Candidate]) -> list[list[float]]:
        return [everywhere(both, live if each.number == 99 else 0.01) for each in candidates]

    chosen = refine(both, run)[1]
    assert (chosen.number == 99) == wins
    policy = both.solver.policy(chosen)
    assert (policy.allocator.name == "model_wide") == wins
    assert chosen.prompt_bytes == policy.footprint(chosen.context, both.source.tables.head_dim)


def test_a_rules_loss_is_its_own_on_every_split(found: Found) -> None:
    both = with_a_rule(found, loss=0.5)
    (point,) = (each for each in both.expected if each.number == 99)
    assert both.source.evicts(point.choice)
    for split in ("select", "evaluate"):
        assert both.source.value_of(point.choice, split) == pytest.approx(0.5)
    assert point.kl == pytest.approx(0.5)
