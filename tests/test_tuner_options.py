"""Menus: which methods a head may have, what they need, and what their options are called."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvtune.policies.format import formats
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.signals import Needs
from kvtune.traces.signals import SIGNALS
from kvtune.tuner import options
from kvtune.tuner.left_out import LEFT_OUT
from kvtune.tuner.options import (
    FULL,
    LAPTOP,
    METHODS,
    ROTATED,
    SMALL,
    WEIGHTED,
    WEIGHTED_BY,
    Menu,
    alike,
    every_method,
)  # fmt: skip
from kvtune.tuner.sources import menu_of, queries_of, signals_of


def test_every_method_is_offered_but_references_and_floors() -> None:
    offered = {method.name for method in every_method()}
    floors_and_references = {"full", "random", "future_attention", "probe_greedy"}
    linked = {"minicache"}  # only where layers come in pairs
    slow = {"retrieval_attention"}
    rules = {"protected", "mustdrop"}  # whose span only a user can name
    learned = {"lococo", "oscar"}  # of a model, before
    rules |= {"weighted_keys"}  # which goes with two formats only
    everyone = {*methods()} - floors_and_references - linked - slow - rules - learned
    readers = {name for name in everyone if methods()[name]().reader(1) is not None}
    assert {"quest", "token_select", "infllm"} < readers
    assert offered == everyone - readers, "what holds everything is no better than all of it"
    assert {m.name for m in every_method(reads_less=True)} == everyone
    assert {m.name for m in every_method(pairs=True)} == offered | linked
    assert {*METHODS, PREFILL} <= {*every_method()}


def test_a_new_method_that_looks_ahead_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ahead(methods()["future_attention"]):  # type: ignore[misc]
        name = "ahead"

    monkeypatch.setattr(options, "methods", lambda: methods() | {"ahead": Ahead})
    assert Ahead not in {type(method) for method in every_method(reads_less=True, pairs=True)}


def test_reasons_are_of_what_no_menu_has() -> None:
    """A new method or format is one file: nobody has to name it here too."""
    pairs = [pair for menu in (SMALL, LAPTOP, FULL) for pair in menu.formats]
    offered = {form.name for pair in (*pairs, *ROTATED, *WEIGHTED) for form in pair}
    offered |= {method.name for method in every_method(reads_less=True, pairs=True)}
    assert {*LEFT_OUT} <= {*methods(), *formats()} - offered
    assert all(reason and not reason.endswith(".") for reason in LEFT_OUT.values())


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("mxfp4", "turboquant4"),
        ("nvfp4", "int4"),
        ("hqq4", "int4"),
        ("hqq2", "int2"),
        ("kivi", "int3"),
        ("kitty", "weighted, allocated 2.1 / turboquant2"),
        ("kvquant+1", "rotated_int4+4 / rotated_int2+4"),
        ("qaq", "int4"),
        ("gear", "turboquant4"),
        ("staircase", "int3"),
        ("weighted, fitted 1.8 / turboquant2", "weighted, allocated 2.1 / turboquant2"),
    ],
)
def test_what_is_left_out_as_worse_was_measured_so(name: str, better: str) -> None:
    file = Path(__file__).parents[1] / "benchmarks/results/formats-live-h200.json"
    found = json.loads(file.read_text("utf-8"))["live"]
    assert found[better]["KL"] < found[name]["KL"]
    bits, fewer = (found[each]["bits an element"] for each in (name, better))
    words = LEFT_OUT["fitted" if "fitted" in name else name.partition("+")[0]]
    assert fewer < bits if "fewer bits" in words else fewer == pytest.approx(bits, rel=0.001)


def test_without_a_calibration_what_needs_one_is_left_out() -> None:
    assert {*every_method()} - {*every_method(calibrated=False)} == {CompressKV()}


def test_a_menu_multiplies_and_keeps_everything_in_each_format() -> None:
    for menu in (SMALL, LAPTOP, FULL):
        options = menu.options()
        evicting = len(menu.methods) * len(menu.shares) * len(menu.formats)
        assert len(set(options)) == len(options) == evicting + len(menu.formats)


def test_whatever_is_offered_has_pages_to_run_in() -> None:
    from kvtune.policies.pages import layout_of
    from kvtune.tuner.baselines import FAMILIES, candidates
    from kvtune.tuner.source_models import packaged_tables

    offered = {option for menu in (SMALL, LAPTOP, FULL) for option in menu.options()}
    offered |= set(packaged_tables()[0].options)
    for family in FAMILIES:
        for policy in candidates(family, 40_000, 256, 2, 2, 64):
            offered |= set(policy.options())
    assert len(offered) > 200
    offered |= {Option(Full(), ALL, *pair) for pair in ROTATED}
    for option in offered:
        layout_of(option, 64)  # refuses what it has no pages for


def test_rotated_formats_are_in_the_menu_of_all_methods_alone() -> None:
    for workload in ("small", "full"):
        asked = [
            cast(Any, SimpleNamespace(workload=workload, menu=menu, reads_less=False, stack=None))
            for menu in ("three", "all")
        ]
        three, every = (menu_of(request, calibrated=False) for request in asked)
        assert every.formats == (*three.formats, *ROTATED)
        assert not {*three.formats} & {*ROTATED}
        assert (three.weighted, every.weighted) == ((), WEIGHTED)


def test_formats_by_channel_are_offered_behind_weighted_keys_alone() -> None:
    """And pages hold what they store."""
    from kvtune.policies.pages import has_pages

    menu = Menu((SnapKV(),), (0.5,), alike((Option().keys,)), WEIGHTED)
    weighted = [option for option in menu.options() if (option.keys, option.values) in WEIGHTED]
    assert len(weighted) == len(WEIGHTED) * (1 + len(WEIGHTED_BY))
    assert {type(option.method) for option in weighted} == {WeightedKeys}
    assert all(has_pages(option, head_dim) for option in weighted for head_dim in (64, 128))
    assert menu.needs.later_queries


def test_a_trace_records_what_the_menu_needs_and_what_baselines_read() -> None:
    pairs = alike((Option().keys,))
    assert signals_of(LAPTOP.needs) == ("column_sums",)
    assert signals_of(Menu((SnapKV(),), (0.5,), pairs).needs) == ("column_sums",)
    asked = {*SIGNALS} - {"repeat_queries", "study_queries"}  # only what a policy file asks for
    assert {*signals_of(Menu(every_method(reads_less=True), (0.5,), pairs).needs)} == asked
    assert queries_of(LAPTOP.needs, 128) == 192
    assert queries_of(Needs(window=400), 128) == 528


def test_labels_tell_settings_of_one_method_apart() -> None:
    assert Option(H2O(), Budget(tokens=9)).label == "h2o 9 bf16"
    assert Option(H2O(recent_share=0.1), Budget(tokens=9)).label == "h2o(recent_share=0.1) 9 bf16"
    assert PREFILL.label == "a2sf(factor=0.95, recent=16)"


def test_published_settings_are_called_by_their_name() -> None:
    kinds: list[type[Method]] = list(methods().values())
    assert [kind().label for kind in kinds] == [kind.name for kind in kinds]
