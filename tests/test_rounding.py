"""What rounding alone makes of live losses: measured in 16 bits and told, nothing in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.common.estimate import Estimate
from kvtune.common.kept import Kept
from kvtune.policies.formats.token_head import Int8TokenHead
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import full_cache, full_policy
from kvtune.runtime.prompts import fresh_prompt
from kvtune.runtime.rounding import kl_of_rounding
from kvtune.tests.conftest import TINY, tiny_network
from kvtune.traces.models import LoadedModel, wrap
from kvtune.tuner.result import Baseline
from kvtune.tuner.rounding import MEASURED, said_of_rounding
from kvtune.tuner.validate import Validation, validate_policies, validate_policy

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 6
WIDER = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": LAYERS}
"""With as few numbers as the tiny model has, two ways to add them are hardly ever rounded apart."""


def int8() -> Policy:
    return Policy.uniform(Option(keys=Int8TokenHead(), values=Int8TokenHead()), LAYERS, 2)


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[Any]]) -> list[Any]:
    return make_samples(3, tokens=96, observed=32, splits=("evaluate",))


@pytest.fixture(scope="module")
def in_16_bits(tokenizer: Any) -> LoadedModel:
    return model_in(torch.bfloat16, tokenizer)


@pytest.fixture(scope="module")
def in_32_bits(tokenizer: Any) -> LoadedModel:
    return model_in(torch.float32, tokenizer)


def model_in(dtype: torch.dtype, tokenizer: Any) -> LoadedModel:
    from transformers import LlamaConfig

    return wrap(tiny_network(LlamaConfig(**TINY | WIDER)).to(dtype), tokenizer, name="tiny")


def run(loaded: LoadedModel, samples: list[Any], kept: Kept, **more: Any) -> list[Validation]:
    def prompt(sample: Any) -> Any:
        return fresh_prompt(loaded, sample, Needs())

    return validate_policies([int8()], loaded, samples, prompt, kept=kept, **more)


def test_two_ways_are_one_but_for_rounding(in_32_bits: LoadedModel, samples: list[Any]) -> None:
    for sample in samples:
        prompt = fresh_prompt(in_32_bits, sample, Needs())
        found = kl_of_rounding(in_32_bits, sample, prompt, full_cache(in_32_bits, sample, prompt))
        assert found.shape == (2, 32)
        assert found.abs().max() < 1e-5


def test_in_16_bits_a_floor_is_measured_and_kept(
    in_16_bits: LoadedModel, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the size of what such rounding makes of a small change, and not measured twice."""
    (found,) = run(in_16_bits, samples, Kept(tmp_path), rounding=True)
    assert found.rounding is not None
    assert 0 < found.rounding < found.live.value
    monkeypatch.setattr("kvtune.tuner.validate.kl_of_rounding", fails)
    assert run(in_16_bits, samples, Kept(tmp_path), rounding=True) == [found]
    assert run(in_16_bits, samples, Kept(tmp_path))[0].rounding is None


def fails(*_: Any) -> Tensor:
    raise AssertionError("a pass was run")


def test_in_float32_nothing_is_run_said_or_kept(
    in_32_bits: LoadedModel, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtune.tuner.validate.kl_of_rounding", fails)
    (found,) = run(in_32_bits, samples, Kept(tmp_path), rounding=True)
    assert found.rounding is None
    assert len([*tmp_path.iterdir()]) == len(samples)  # a file for each live run
    assert validate_policy(int8(), in_32_bits, samples, rounding=True).rounding is None


def test_a_stacks_way_to_run_has_a_floor_of_its_own(
    in_16_bits: LoadedModel, samples: list[Any]
) -> None:
    """That of the uncompressed cache run in one pass over all tokens, as such policies are."""
    whole = full_policy(in_16_bits)
    found = validate_policy(whole, in_16_bits, samples, stored_alike=True, rounding=True)
    assert found.live.value > 0
    assert found.rounding == pytest.approx(found.live.value, rel=1e-5)


def baseline(name: str, loss: float | None) -> Baseline:
    live = None if loss is None else Estimate(loss, loss, loss, "nats/token", "live")
    predicted = Estimate(1.0, 1.0, 1.0, "nats/token", "table")
    return Baseline(name, "uniform", predicted, live, prompt_bytes=1)


def test_only_losses_that_are_near_the_floor_are_named() -> None:
    made = [baseline("plan", 0.002), baseline("h2o", 0.0061), baseline("not run", None)]
    said = said_of_rounding({MEASURED: 0.0016666, "dtype": "bfloat16"}, made)
    assert said is not None
    assert "in bfloat16 the uncompressed cache differs from itself by 0.0017 nats a token" in said
    assert "within 3 times of it: plan." in said
    assert "--device cpu" in said
    assert said_of_rounding({MEASURED: 0.0016666, "dtype": "float16"}, made[1:]) is None
    assert said_of_rounding({"dtype": "float32"}, made) is None
    assert said_of_rounding({MEASURED: 0.0, "dtype": "bfloat16"}, [baseline("plan", 0.0)]) is None
