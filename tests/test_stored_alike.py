"""What a plan loses where answers are stored as prompts are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtune.common.estimate import Estimate
from kvtune.policies.export.contract import find_exporter
from kvtune.policies.export.stored_alike import RATIOS, loss_there, usual_ratio
from kvtune.policies.formats.fp8 import Fp8
from kvtune.policies.formats.token_head import Int4TokenHead
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy

LOSS = Estimate(0.01, 0.005, 0.02, "nats/token", "live")
NARROW = Option(keys=Int4TokenHead(), values=Int4TokenHead())


def test_a_plan_of_one_format_loses_as_many_times_as_was_measured() -> None:
    least, mean, most = RATIOS["int4_token_head"]
    found = loss_there(LOSS, Policy.uniform(NARROW, 4, 2), find_exporter("vllm").limits)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.01 * mean, 0.005 * least, 0.02 * most)
    )
    assert found.tier == "transferred"


def test_heads_in_16_bits_lose_no_more_so_that_a_mixed_plan_may_lose_as_little_as_before() -> None:
    mixed = Policy("mixed", ((NARROW, Option()),) * 4)
    found = loss_there(LOSS, mixed, find_exporter("vllm").limits)
    assert found is not None
    assert found.low == LOSS.low
    assert found.high == pytest.approx(0.02 * RATIOS["int4_token_head"][2])
    assert loss_there(LOSS, Policy.uniform(Option(), 4, 2), find_exporter("vllm").limits) == LOSS


def test_of_a_format_that_nobody_measured_so_nothing_is_said() -> None:
    form = Fp8()
    limits = replace(find_exporter("vllm").limits, own=(form,))
    policy = Policy.uniform(Option(keys=form, values=form), 4, 2)
    assert loss_there(LOSS, policy, limits) is None
    assert usual_ratio(limits) == 1.0
    assert loss_there(LOSS, policy, replace(limits, own=())) == LOSS, "stored as kvtune stores it"
