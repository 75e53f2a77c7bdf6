"""What exports lose that run less than the plan, of a model that is not at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtune.common.estimate import BAND
from kvtune.common.words import figure
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.export.stored_alike import RATIOS, loss_there
from kvtune.policies.formats.grouped import Int4
from kvtune.policies.formats.token_head import Int4TokenHead
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument
from kvtune.tests.made_up import llama
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.what_if import Setting, figures_of
from kvtune.tuner.flattened import loss_on_stack
from kvtune.tuner.search import run_search

FACTS = ModelFacts("an 8B's shape", 32, 8, 128)
NARROW = Option(keys=Int4TokenHead(), values=Int4TokenHead())


def test_an_eviction_that_is_dropped_is_predicted_as_what_is_left_of_it() -> None:
    plan = Policy.uniform(Option(SnapKV(), Budget(share=0.25), Int4(), Int4()), 32, 8)
    for stack in ("vllm", "llama-cpp", "openvino"):
        made = find_exporter(stack)().export(PolicyDocument(plan, FACTS), predict=loss_on_stack)
        found = made.predicted
        assert found is not None
        assert f"loses {figure(found)}" in made.files["REPORT.txt"]
        assert found.tier == BAND
        assert 0 < found.low < found.value < found.high
    made = find_exporter("sglang")().export(PolicyDocument(plan, FACTS), predict=loss_on_stack)
    assert made.predicted is None, "its arithmetic is not known"


def test_the_band_of_one_format_is_that_of_a_search_that_chooses_it(tmp_path: Path) -> None:
    result = run_search(llama(tmp_path, stack="vllm", sequences=12))
    limits = find_exporter("vllm").limits
    shape = result.request.shape
    facts = ModelFacts(shape.name, shape.layers, shape.kv_heads, shape.head_dim)
    found = loss_on_stack("vllm", result.policy, facts)
    expected = loss_there(result.quality.kl, result.policy, limits)
    assert found is not None
    assert expected is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-5)


def test_half_of_the_layers_lose_less_than_all_of_them() -> None:
    half = Policy("half", ((NARROW,) * 8,) * 16 + ((Option(),) * 8,) * 16)
    losses = [
        loss_on_stack("vllm", policy, FACTS) for policy in (half, Policy.uniform(NARROW, 32, 8))
    ]
    some, whole = losses
    assert some is not None
    assert whole is not None
    assert some.value < whole.value
    nothing = loss_on_stack("vllm", Policy.uniform(Option(), 32, 8), FACTS)
    assert nothing is not None
    assert nothing.value == 0
    assert np.isfinite(RATIOS["int4_token_head"]).all()
    assert loss_on_stack("vllm", Policy.uniform(Option(keys=Int4()), 32, 8), FACTS) is None


def test_the_explorer_counts_a_plan_as_the_stack_lays_it_out(tmp_path: Path) -> None:
    result = run_search(llama(tmp_path, stack="vllm", sequences=12))
    study = StudyReader(tmp_path).read()
    found = figures_of(study, Setting.asked(study.facts))
    row = study.chosen
    assert row is not None
    assert found.each[row] == result.sequence_bytes
    longer = figures_of(study, replace(Setting.asked(study.facts), context_tokens=16384))
    assert longer.each[row] > 1.9 * found.each[row]
    own = replace(study, facts=replace(study.facts, stack=""))
    assert figures_of(own, Setting.asked(own.facts)).each[row] != result.sequence_bytes
