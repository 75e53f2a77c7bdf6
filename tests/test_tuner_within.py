"""A search inside what a serving stack can express."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.common.errors import KvtuneError
from kvtune.policies.export.contract import exporters, find_exporter
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.grouped import Int4, Int8
from kvtune.policies.formats.llama_cpp import Q4, Q8
from kvtune.policies.formats.token_head import Int4TokenHead, Int8TokenHead
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument, Serving
from kvtune.simulator.quality.tables import SampleFacts, Tables
from kvtune.tests.tiers import first
from kvtune.tuner.options import LAPTOP
from kvtune.tuner.question import Question
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.study import run_study
from kvtune.tuner.within import expressible, limits_of, menu_within

L, H, D, P = 4, 2, 64, 1024
STACKS = sorted(exporters())
OWN = Int8TokenHead(), Int4TokenHead(), Q8(rotation="hadamard"), Q4(rotation="hadamard")
OPTIONS = (
    *(Option(Full(), ALL, form, form) for form in (Bf16(), Fp8(), Int8(), Int4(), *OWN)),
    Option(Full(), ALL, Int4(exact_first=4), Int4(exact_first=4)),
    Option(SnapKV(), Budget(share=0.25)),
    Option(SnapKV(), Budget(share=0.25), Int4(), Int4()),
)


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Losses that nobody has measured: heads differ, and narrower options lose more."""
    draw = np.random.default_rng(0)
    size = (2, L * H, len(OPTIONS))
    base = np.array([0, 1, 1, 4, 1, 4, 1, 4, 3, 6, 9]) * 1e-3
    loss = (base * draw.uniform(0.5, 2, size)).astype(np.float32)
    factor = (draw.normal(0, 0.01, (*size, 3)) * (base > 0)[:, None]).astype(np.float32)
    samples = (SampleFacts("a", "search", "prose"), SampleFacts("b", "select", "prose"))
    return Tables("tiny", L, H, D, P, OPTIONS, samples, loss, factor, np.arange(2))


def solver_for(tables: Tables, stack: str | None, sequences: int | None = None) -> Solver:
    rooms, held = {P: 3 * 2 * 2 * P * D * L * H}, {P: tables.footprints(P, D)}
    return Solver.of(
        Question(tables, D, rooms, held, 4096, lambda *_: 0, sequences, limits_of(stack))
    )


@pytest.mark.parametrize("stack", ["llama-cpp", "vllm", *first(STACKS, 2)])
def test_every_plan_of_a_search_for_a_stack_loses_nothing_there(tables: Tables, stack: str) -> None:
    solver = solver_for(tables, stack)
    found = run_study(solver, trials=16)
    assert len(found) > 4
    for candidate in (*found, *simple_points(solver, first=16)):
        facts = ModelFacts("tiny", L, H, D)
        serving = Serving(context_tokens=P, batch=1)
        document = PolicyDocument(solver.policy(candidate), facts, serving=serving)
        made = find_exporter(stack)().export(document, model="models/tiny")
        assert "not expressible" not in {line.status for line in made.report}, made.report
        assert made.keeps_loss or not find_exporter(stack).limits.own


def test_without_a_stack_heads_choose_alone_among_all_options(tables: Tables) -> None:
    question = solver_for(tables, None).question
    assert question.options == list(OPTIONS)
    assert question.splits == ("heads", "layers")
    assert question.narrow_formats == []


def test_a_stack_that_decides_once_for_all_gets_one_option(tables: Tables) -> None:
    for candidate in run_study(solver_for(tables, "llama-cpp"), trials=8):
        assert len(set(candidate.choice.tolist())) == 1


def test_a_stack_that_decides_by_layer_gets_one_format_beside_16_bits(tables: Tables) -> None:
    found = run_study(solver_for(tables, "vllm"), trials=24)
    kinds = [{OPTIONS[o].keys.name for o in each.choice} - {"bf16"} for each in found]
    assert max(map(len, kinds)) == 1
    assert len(set.union(*kinds)) > 1, "all of them are tried"
    for each in found:
        assert (each.choice.reshape(L, H) == each.choice.reshape(L, H)[:, :1]).all()


@pytest.mark.parametrize("stack", STACKS)
def test_a_menu_within_a_stack_is_expressible_and_has_the_uncompressed_cache(stack: str) -> None:
    options = menu_within(LAPTOP, limits_of(stack)).options()
    assert all(expressible(option, limits_of(stack)) for option in options)
    assert Option() in options


def test_an_unknown_stack_is_told_with_the_nearest() -> None:
    with pytest.raises(KvtuneError, match="unknown exporter 'vlm'"):
        limits_of("vlm")
