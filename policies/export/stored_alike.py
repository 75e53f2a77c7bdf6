"""What a plan loses on a stack that stores each token as it comes, prompts and answers alike.

A plan's loss is that of a prompt that was read uncompressed and stored afterwards, its answer in 16
bits. vLLM and llama.cpp read a prompt through what they have stored of it, and store the answer
likewise, which loses several times as much.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from kvtune.common.estimate import BAND, Estimate
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.policy import Policy

RATIOS: dict[str, tuple[float, float, float]] = {
    "q4_0-rotated": (3.95, 5.06, 7.62),
    "int4_token_head": (4.64, 5.39, 7.1),
    "q8_0-rotated": (2.37, 3.96, 7.5),
    "int8_token_head": (4.37, 5.57, 8.43),
    "fp8_token_head": (2.61, 4.88, 7.31),
    "openvino_u8": (2.32, 3.15, 5.15),
    "openvino_u4": (2.05, 3.12, 4.89),
}
"""By format, the loss of everything stored alike over that of the prompt alone: the least of three
texts of one model, one of each kind, their mean's, and the most (SmolLM2-135M,
``benchmarks/stored_answers.py``, ``benchmarks/results/stored-answers-cpu.json``). All heads had the
format; so few texts show that it is several times, and not how far models differ."""


def usual_ratio(limits: EngineLimits) -> float:
    """How many times its prompt's loss a plan loses in a stack's formats, in the mean of these.

    1 where none of them was measured: live rounds begin with what the prompt loses then.
    """
    known = [RATIOS[form.label][1] for form in limits.own if form.label in RATIOS]
    return fmean(known) if known else 1.0


def loss_there(loss: Estimate, policy: Policy, limits: EngineLimits) -> Estimate | None:
    """The loss of a plan in an engine's own formats, answers and the reading of prompts included.

    An upper bound for plans some of whose heads have other formats: their low end stays. None where
    one of them was not measured.

    Args:
        loss: of the plan, as a search printed it.
        policy: the plan.
        limits: of the engine; one without formats of its own names no loss of narrow ones.
    """
    forms = {form for option in policy.options() for form in (option.keys, option.values)}
    own = [form.label for form in forms if form in limits.own]
    if not own:
        return loss
    if not set(own) <= set(RATIOS):
        return None
    found = [RATIOS[label] for label in own]
    least, mean, most = max(found, key=lambda ratios: ratios[1])
    if len(found) < len(forms):
        least = 1.0
    tier = loss.tier if loss.tier == BAND else "transferred"
    ends = loss.low * least, loss.high * most
    return replace(loss, value=loss.value * mean, low=ends[0], high=ends[1], tier=tier)
