"""Studies as snapshots: written, read back, followed; what is wrong with them is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.stored import checked, parse_json
from kvtune.policies.formats.fitted import Fitted
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.methods.kvzip import KVzip
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.retrieval_attention import RetrievalAttention
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import find_gpu
from kvtune.simulator.cost import policy_cost
from kvtune.simulator.memory.plan import memory_plan
from kvtune.tests.made_up import CONTEXT, facts, plans, write_study
from kvtune.tuner.explore import PLANS_FILE
from kvtune.tuner.explore.axes import AXES, LOSS, TOKENS, Axis, Filter, front, option_bits
from kvtune.tuner.explore.compare import HeadMap, baseline_side, difference, plan_side
from kvtune.tuner.explore.plans import Line, read_line, write_line
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View
from kvtune.tuner.explore.what_if import Setting, figures, figures_of
from kvtune.tuner.explore.why import why


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return StudyReader(write_study(tmp_path_factory.mktemp("run"))).read()


def view_of(study: Study, **changes: object) -> View:
    setting = Setting.asked(study.facts)
    return replace(View(study, figures_of(study, setting), setting), **changes)  # type: ignore[arg-type]


def test_what_is_written_is_read_back(study: Study) -> None:
    assert study.facts == facts()
    for read, written in zip(
        map(study.plans.__getitem__, range(60)), plans(60, facts()), strict=True
    ):
        assert (read.heads == written.heads).all()
        none = written.heads[:0]  # arrays have no truth value, which Python 3.13 asks for
        assert vars(replace(read, heads=none)) == vars(replace(written, heads=none))


def test_new_lines_are_read_when_they_are_whole(tmp_path: Path) -> None:
    made = plans(5, facts())
    folder = write_study(tmp_path, 3, finished=False)
    reader = StudyReader(folder)
    assert len(reader.read().plans) == 3
    line = write_line(made[3])
    with (folder / PLANS_FILE).open("a") as file:
        file.write(line[:20])
        file.flush()
        assert len(reader.read().plans) == 3
        file.write(line[20:])
    assert len(reader.read().plans) == 4


def test_nothing_new_costs_no_new_columns(tmp_path: Path) -> None:
    reader = StudyReader(write_study(tmp_path, 3))
    assert reader.read().plans is reader.read().plans


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    reader = StudyReader(write_study(tmp_path, 8))
    reader.read()
    write_study(tmp_path, 4, study="another", finished=False)
    found = reader.read()
    assert (found.facts.study, len(found.plans)) == ("another", 4)


def test_another_searchs_result_is_not_this_ones(tmp_path: Path) -> None:
    write_study(tmp_path, 4)
    write_study(tmp_path, 4, study="another", finished=False)
    assert StudyReader(tmp_path).read().outcome is None


@pytest.mark.parametrize(("silent", "state"), [(1, "running"), (4000, "stopped")])
def test_a_silent_search_has_stopped(tmp_path: Path, silent: float, state: str) -> None:
    path = write_study(tmp_path, 3, finished=False) / PLANS_FILE
    os.utime(path, (1000, 1000))
    assert StudyReader(tmp_path, now=lambda: 1000 + silent).read().state == state


def _no_folder(folder: Path) -> Path:
    return folder / "nowhere"


def _empty_folder(folder: Path) -> Path:
    return folder


def _no_facts(folder: Path) -> Path:
    (folder / PLANS_FILE).touch()
    return folder


def _newer(folder: Path) -> Path:
    plain = facts().as_plain() | {"kvtune_plans": 99, "kvtune": "9.0"}
    (folder / PLANS_FILE).write_text(json.dumps(plain) + "\n")
    return folder


def _damaged_line(folder: Path) -> Path:
    write_study(folder, 2)
    with (folder / PLANS_FILE).open("a") as file:
        file.write("{not json}\n")
    return folder


def _lacking(folder: Path) -> Path:
    write_study(folder, 2)
    with (folder / PLANS_FILE).open("a") as file:
        file.write('{"trial": 3}\n')
    return folder


def _other_size(folder: Path) -> Path:
    write_study(folder, 2)
    with (folder / PLANS_FILE).open("a") as file:
        plan = plans(1, facts())[0]
        file.write(write_line(replace(plan, heads=plan.heads[:7])))
    return folder


def _old_run(folder: Path) -> Path:
    (folder / "result.json").write_text("{}")
    return folder


def _damaged_result(folder: Path) -> Path:
    write_study(folder, 2)
    (folder / "result.json").write_text("[1, 2]")
    return folder


BAD: dict[Callable[[Path], Path], str] = {
    _no_folder: "there is no such folder",
    _empty_folder: "there is no study here",
    _no_facts: "has not begun",
    _newer: "written by a newer kvtune",
    _damaged_line: "this study is damaged",
    _lacking: "this study is damaged",
    _other_size: "this study is damaged",
    _old_run: "before plans were recorded",
    _damaged_result: "this result is damaged, or of another version",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__.strip("_"))
def test_what_is_wrong_is_said(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(KvtuneError, match=BAD[make]) as raised:
        StudyReader(make(tmp_path)).read()
    assert raised.value.where


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvtuneError, match=r"plans\.jsonl:4"):
        StudyReader(_damaged_line(tmp_path)).read()


# --- memory and time of all plans at once --------------------------------------------------------

SETTINGS = {
    "as searched": {},
    "longer": {"context_tokens": 16384},
    "fewer": {"sequences": 3},
    "another card": {"gpu": find_gpu("h100"), "memory_bytes": 60 * 10**9, "weights": "bf16"},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_columns_agree_with_the_models_one_by_one(study: Study, changes: dict[str, object]) -> None:
    setting = replace(Setting.asked(study.facts), **changes)  # type: ignore[arg-type]
    figures = figures_of(study, setting)
    shape, generated = study.facts.shape, study.facts.generated_tokens
    for row in (0, 17, 42):
        plan = study.plans[row]
        context = setting.context_tokens or plan.context_tokens
        budget = memory_plan(
            shape,
            setting.gpu,
            setting.memory_bytes,
            context_tokens=context,
            weights=setting.weights,
        )
        budget = budget.at(setting.sequences or plan.sequences)
        cost = policy_cost(study.policy(plan), replace(budget, generated_tokens=generated))
        assert figures.prompt_bytes[row] == cost.prompt_bytes
        assert figures.tokens_that_fit[row] == cost.sequences_that_fit * context
        assert figures.memory[row] == pytest.approx(
            (cost.memory.value, cost.memory.low, cost.memory.high)
        )
        assert figures.estimate("step_s", row) == pytest.approx(cost.latency) or np.allclose(
            figures.step_s[row], (cost.latency.value, cost.latency.low, cost.latency.high)
        )
        assert figures.estimate("step_s", row).tier == cost.latency.tier
        rate = cost.tokens_per_second
        assert figures.tokens_per_s[row] == pytest.approx((rate.value, rate.low, rate.high))


def test_a_plan_that_waits_holds_one_prompt_more_in_the_columns_too(study: Study) -> None:
    known, option = study.facts, Option(KVzip(), Budget(share=0.25))
    setting, shape = Setting.asked(known), known.shape
    counts = np.array([[float(shape.layers * shape.kv_heads)]])
    context, sequences = np.array([CONTEXT]), np.array([2])
    columns = figures(known, [Policy.uniform(option, 1, 1)], counts, context, sequences, setting)
    budget = memory_plan(
        shape,
        setting.gpu,
        setting.memory_bytes,
        context_tokens=CONTEXT,
        weights=setting.weights,
    )
    policy = Policy.uniform(option, shape.layers, shape.kv_heads)
    cost = policy_cost(policy, replace(budget, batch=2, generated_tokens=known.generated_tokens))
    assert columns.memory[0, 0] == pytest.approx(cost.memory.value)
    assert columns.tokens_that_fit[0] == cost.sequences_that_fit * CONTEXT


HOST = Option(Quest(block=64), Budget(tokens=256), tier="host")
READ = Option(Quest(block=64), Budget(tokens=256))
SEARCHED = Option(RetrievalAttention(beam=64), Budget(tokens=256), tier="host")
BACK = Option(SnapKV(), Budget(share=0.25), Fitted(), Fitted())
PLAIN = Option(SnapKV(), Budget(share=0.25), Int4(), Int4())


@pytest.mark.parametrize("card", ["4090", "h200"])
def test_steps_that_use_the_host_a_reader_or_no_kernel_take_what_the_models_say(
    study: Study, card: str
) -> None:
    """Each option in all heads, in every other one, and in every other layer."""
    known, shape = study.facts, study.facts.shape
    options, size = (PLAIN, READ, HOST, SEARCHED, BACK), (shape.layers, shape.kv_heads)
    every_other = [np.indices(size)[axis] % 2 for axis in (0, 1)]
    heads = np.stack(
        [np.full(size, number) for number in range(5)]
        + [number * place for number in range(1, 5) for place in every_other]
        + [np.where(every_other[0], 2, 4)]
    ).reshape(-1, shape.layers * shape.kv_heads)
    counts = np.stack([(heads == number).sum(1) for number in range(5)], 1).astype(float)
    setting = Setting(find_gpu(card), 22 * 10**9, "bf16")
    contexts = np.where(np.arange(len(heads)) % 3, 16384, 8192)
    given = [Policy.uniform(option, 1, 1) for option in options]
    columns = figures(known, given, counts, contexts, contexts // 4096, setting, heads)
    for row, numbers in enumerate(heads.reshape(-1, *size).tolist()):
        policy = Policy("made up", tuple(tuple(options[n] for n in layer) for layer in numbers))
        budget = memory_plan(
            shape, setting.gpu, setting.memory_bytes, context_tokens=int(contexts[row]),
            generated_tokens=known.generated_tokens, weights="bf16",
        )  # fmt: skip
        asked = policy_cost(policy, budget.at(int(contexts[row]) // 4096)).latency
        told = columns.estimate("step_s", row)
        assert (told.value, told.low, told.high) == pytest.approx(
            (asked.value, asked.low, asked.high), rel=1e-6
        )
        assert told.tier == asked.tier


def test_an_impossible_setting_is_refused(study: Study) -> None:
    with pytest.raises(KvtuneError, match="does not fit"):
        figures_of(study, replace(Setting.asked(study.facts), memory_bytes=10**9))


# --- front, filters, cursor ----------------------------------------------------------------------

POINTS = hnp.arrays(
    np.float64, st.tuples(st.integers(0, 30), st.just(2)), elements=st.integers(0, 9)
)


@given(POINTS, st.sampled_from(AXES), st.sampled_from(AXES))
def test_the_front_is_what_no_point_beats(points: np.ndarray, across: Axis, up: Axis) -> None:
    x = points[:, 0] if across.less_is_better else -points[:, 0]
    y = points[:, 1] if up.less_is_better else -points[:, 1]
    found = front(points[:, 0], points[:, 1], across, up)
    beaten = [any((x <= a) & (y <= b) & ((x < a) | (y < b))) for a, b in zip(x, y, strict=True)]
    assert {(x[i], y[i]) for i in found} == {
        (a, b) for a, b, worse in zip(x, y, beaten, strict=True) if not worse
    }


def test_steps_go_along_the_front_and_stay_on_it(study: Study) -> None:
    view = view_of(study)
    row = int(view.front[0])
    walked = [row]
    for _ in view.front:
        row = view.step(row, 1)
        walked.append(row)
    assert walked == [*view.front, view.front[-1]]
    assert view.step(row, -(10**6)) == view.front[0]


@pytest.mark.parametrize(
    "chosen",
    [
        Filter(largest_kl=0.01),
        Filter(split="layers"),
        Filter(method="streaming_llm"),
        Filter(least_bits=4),
        Filter(fits=True),
        Filter(largest_kl=0.05, split="heads", fits=True),
    ],
    ids=lambda f: f.words,
)
def test_a_filter_lets_through_exactly_what_it_says(study: Study, chosen: Filter) -> None:
    view = view_of(study, filter=chosen)
    kept = set(view.rows.tolist())
    assert set(view.front) <= kept
    for row in range(len(study.plans)):
        plan, options = study.plans[row], list(study.policy(study.plans[row]).options())
        passes = [
            chosen.largest_kl is None or plan.kl.value <= chosen.largest_kl,
            chosen.split is None or plan.parameters["split"] == chosen.split,
            chosen.method is None or any(o.method.name == chosen.method for o in options),
            chosen.least_bits is None
            or all(option_bits(o)[0] >= chosen.least_bits for o in options),
            not chosen.fits or bool(view.figures.fits[row]),
        ]
        assert (row in kept) == all(passes)


def test_the_chosen_plan_is_the_results(study: Study) -> None:
    assert study.chosen is not None
    assert study.outcome is not None
    assert study.plans[study.chosen].parameters == study.outcome.parameters
    assert study.quality(study.plans[study.chosen]) == study.outcome.quality.kl


def test_before_the_end_the_best_so_far_is_shown(tmp_path: Path) -> None:
    study = StudyReader(write_study(tmp_path, 30, finished=False)).read()
    assert study.chosen is not None
    best = study.plans[study.chosen]
    within = [p for p in map(study.plans.__getitem__, range(30)) if p.kl.value <= 0.02]
    assert best.sequences == max(p.sequences for p in within)


def test_every_plan_has_its_reason(study: Study) -> None:
    assert study.chosen is not None
    reasons = [why(study, study.plans[row])[0] for row in range(len(study.plans))]
    assert reasons[study.chosen].startswith("It holds most tokens")
    assert all(r.startswith("Not chosen") for i, r in enumerate(reasons) if i != study.chosen)


def test_a_plan_within_the_limit_by_luck_is_not_said_to_have_lost_to_finalists(
    study: Study,
) -> None:
    """The plan with most tokens looks good enough; on unseen samples its like are not."""
    rows = [study.plans[row] for row in range(len(study.plans))]
    within = [p for p in rows if p.kl.value <= study.facts.largest_kl]
    lucky = max(within, key=lambda p: p.sequences)
    second = max((p for p in within if p.sequences < lucky.sequences), key=lambda p: p.sequences)
    assert study.outcome is not None
    (point,) = study.outcome.front
    chosen = replace(point, parameters=second.parameters, sequences=second.sequences)
    picked = replace(study, outcome=replace(study.outcome, front=(chosen,)))
    assert why(picked, second)[0].startswith("It holds most tokens")
    assert "samples that the choice did not see" in why(picked, lucky)[0]
    unseen = Estimate(0.03, 0.02, 0.04, "nats/token", "table")
    on_front = replace(
        point, parameters=lucky.parameters, sequences=lucky.sequences, chosen=False, unseen=unseen
    )
    picked = replace(study, outcome=replace(study.outcome, front=(chosen, on_front)))
    assert "loses more than the 0.02" in why(picked, lucky)[0]


def test_while_a_search_runs_its_best_is_said_to_be_of_now(tmp_path: Path) -> None:
    study = StudyReader(write_study(tmp_path, 30, finished=False)).read()
    assert study.chosen is not None
    assert "may pick another" in why(study, study.plans[study.chosen])[0]


# --- two beside each other -----------------------------------------------------------------------


def test_a_plan_differs_from_itself_nowhere(study: Study) -> None:
    policy = study.policy(study.plans[7])
    apart = difference(policy, policy, CONTEXT, 128)
    assert (apart.heads, apart.more, apart.fewer) == (0, 0, 0)
    assert (apart.ratio == 1).all()


def test_head_bytes_add_up_to_the_prompt(study: Study) -> None:
    plan = study.plans[9]
    heads = HeadMap.of(study.policy(plan), CONTEXT)
    assert heads.bytes(128).sum() + 4 * heads.tokens.size == plan.prompt_bytes


def test_baselines_with_a_file_have_heads_and_others_say_so(study: Study) -> None:
    assert study.outcome is not None
    assert study.chosen is not None
    plan, setting = study.plans[study.chosen], Setting.asked(study.facts)
    ours = plan_side(study, plan, setting)
    greedy, uniform = (baseline_side(study, b, plan, setting) for b in study.outcome.baselines[1:3])
    assert greedy.prompt_bytes == ours.prompt_bytes
    assert greedy.policy is not None
    assert (uniform.policy, uniform.figures) == (None, None)


def test_tokens_axis_counts_whole_sequences(study: Study) -> None:
    view = view_of(study, x=TOKENS, y=LOSS)
    assert (view.across[:, 0] % CONTEXT == 0).all()


ODD = (
    (b'"trial": 3', b'"trial": 3, "trial": 4'),
    (b'"trial": 3', b'"trial": 3, "tri\\u0061l": 4'),
    (b'"split"', b'"spl\\"it"'),
    (b'"split"', b'"spl\\u0069t"'),
    (b'"split"', b'"least_bits": 3, "split"'),
    (b'"shrinkage": 0.43', b'"shrinkage": NaN'),
    (b'"shrinkage": 0.43', b'"shrinkage": 1e999'),
    (b'"shrinkage": 0.43', b'"shrinkage": 1234567890123456789012'),
    (b'"shrinkage": 0.43', b'"shrinkage": {"deep": [[1]]}'),
    (b'"split"', b'"\\ud800": 1, "split"'),
    (b'"prompt_bytes"', b'"more": 1, "prompt_bytes"'),
)


@pytest.mark.parametrize(("plain", "odd"), ODD)
def test_the_quick_reading_of_a_line_is_the_careful_one(plain: bytes, odd: bytes) -> None:
    text = write_line(plans(4, facts())[3]).strip().encode()
    assert plain in text
    answers: list[Line | str] = []
    for line in (text.replace(plain, odd, 1), text):
        for read in (read_line, lambda t, at: checked(Line, parse_json(t, at), at)):
            try:
                answers.append(read(line, "x:2"))
            except KvtuneError as error:
                answers.append(str(error))
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def test_damage_is_told_again_at_every_reading(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "run", 5)
    lines = (folder / PLANS_FILE).read_text().splitlines(keepends=True)
    (folder / PLANS_FILE).write_text("".join([*lines[:3], "{}\n", *lines[4:]]))
    reader = StudyReader(folder)
    for _ in range(2):
        with pytest.raises(KvtuneError, match=r"plans.jsonl:4: this study is damaged"):
            reader.read()
