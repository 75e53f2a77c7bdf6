"""Which methods a search tries where nobody said: by device, by what a wider menu would add."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtune.profiles.gpus import find_gpu
from kvtune.profiles.models import find_model
from kvtune.traces import models
from kvtune.tuner.options import FEW, LAPTOP
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.sources import menu_of
from kvtune.tuner.which_menu import ADDED_S, ADDED_SHARE, Seconds, seconds_of, with_menu

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def request(name: str = "smollm2-135m", **asked: Any) -> SearchRequest:
    shape = find_model("smollm2-135m")
    plain: dict[str, Any] = {"device": "cpu", **asked}
    return SearchRequest(name, shape, find_gpu("4090"), 2**30, Path("run"), **plain)


def big(**asked: Any) -> SearchRequest:
    return replace(request("./big", **asked), shape=find_model("llama-8b"))


def test_a_gpu_tries_all_and_says_so() -> None:
    found, told = with_menu(request(device="cuda"))
    assert found == request(device="cuda", menu="all")
    count = len(menu_of(found, calibrated=False, pairs=True).methods)
    assert f"all {count} are tried" in told
    assert "--menu three" in told


def test_the_device_is_this_machines_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "best_device", lambda: "cuda")
    assert with_menu(request(device=None))[0].menu == "all"
    monkeypatch.setattr(models, "best_device", lambda: "cpu")
    assert with_menu(request(device=None), cores=2)[0].menu == "few"


def test_two_cores_try_a_few_more_and_say_what_all_would_take() -> None:
    found, told = with_menu(request(), cores=2)
    assert found == request(menu="few")
    assert "--menu all tries all" in told
    seconds = seconds_of(found, 2)
    assert f"in about {round(seconds.all / 60)} minutes" in told


@pytest.mark.parametrize("menu", ["three", "few", "all"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_named_is_taken_without_a_word(menu: str, device: str) -> None:
    asked = request(menu=menu, device=device)
    assert with_menu(asked) == (asked, "")


@pytest.mark.parametrize("asked", [request(stand_in=True), request("llama-3.1-8b")])
def test_a_stand_in_has_three_methods_and_nothing_is_said(asked: SearchRequest) -> None:
    asked = replace(asked, shape=find_model("llama-8b"))
    assert with_menu(asked) == (replace(asked, menu="three"), "")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stack_that_runs_no_others_has_three_methods_and_nothing_is_said(device: str) -> None:
    asked = request(stack="vllm", device=device)
    every = menu_of(replace(asked, menu="all"), calibrated=False)
    assert every == menu_of(replace(asked, menu="three"), calibrated=False)
    assert with_menu(asked) == (replace(asked, menu="three"), "")


def test_a_wider_menu_is_taken_while_it_adds_no_more_than_is_allowed() -> None:
    assert Seconds(10, 10 + ADDED_S, 10**4).allows("few")
    assert not Seconds(10, 11 + ADDED_S, 10**4).allows("few")
    assert Seconds(1000, 1000 * (1 + ADDED_SHARE), 10**4).allows("few")
    assert not Seconds(1000, 1001 * (1 + ADDED_SHARE), 10**4).allows("few")


def test_seconds_grow_with_samples_and_model_and_fall_with_cores() -> None:
    two = seconds_of(request(), 2)
    assert two.three < two.few < two.all
    assert seconds_of(request(), 1).all == pytest.approx(2 * two.all)
    assert seconds_of(request(), 64) == seconds_of(request(), 4)  # not measured beyond
    assert seconds_of(request(workload="mixed"), 2).three == pytest.approx(27 / 9 * two.three)
    assert seconds_of(big(), 2).three > 10 * two.three


@pytest.mark.parametrize("menu", ["three", "few"])
def test_the_estimate_is_what_searches_took_on_one_machine(menu: str) -> None:
    file = RESULTS / f"search-stages-merged-{menu}-cpu.json"
    (search,) = json.loads(file.read_text(encoding="utf-8"))["searches"]
    processor, clock = (getattr(seconds_of(request(), cores), menu) for cores in (1, 2))
    assert processor == pytest.approx(search["processor"], rel=0.05)
    assert clock == pytest.approx(search["seconds"], rel=0.12)  # two threads wait for each other


def test_few_has_all_of_the_three_methods_options_and_some_more() -> None:
    few, three = set(FEW.options()), set(LAPTOP.options())
    assert three < few
    assert len(few) < 2 * len(three)
    assert menu_of(request(menu="few"), calibrated=False) == FEW
