"""What a plan loses on prompts of another length than its loss was measured on.

Budgets are shares of the prompt, and on shorter prompts no fewer tokens than where the plan was
found (``Tables.with_floors``). What then changes with the length was fitted on recorded live runs;
where the model's weights are at hand, the chosen plan can also be run at another length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.common.bounds import Count, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Progress
from kvtune.common.units import format_tokens
from kvtune.common.words import figure
from kvtune.policies.policy import Policy

if TYPE_CHECKING:
    from kvtune.traces.models import LoadedModel
    from kvtune.tuner.request import SearchRequest


@dataclass(frozen=True)
class Carried:
    """Live loss at another length over that where a plan was found, a power of the lengths' ratio.

    Args:
        power: of the ratio of prompt tokens.
        reach: half of the interval that holds 80 % of the plans, as a logarithm.
        most: ratio of lengths, or its inverse, beyond which nothing was run; beyond it the power
            is not believed to go on.
    """

    power: float
    reach: float
    most: float

    def times(self, ratio: float) -> tuple[float, float, float]:
        """The factor of the loss and its 80 % interval, at so many times the prompt tokens."""
        known = min(max(ratio, 1 / self.most), self.most)
        middle = self.power * math.log(known)
        return tuple(math.exp(middle + side) for side in (0.0, -self.reach, self.reach))  # type: ignore[return-value]


LONGER = Carried(power=-0.269, reach=0.348, most=9.0)
"""SmolLM2, plans of 3, 6, 12 and 25 % of the bytes from 512 to 8,192 tokens, run at longer prompts.

Fitted and tested, with one length, share or run left out, by ``benchmarks/lengths_judged.py``. A
power that depends on the share foretells left-out plans no better.
"""
SHORTER = Carried(power=0.49, reach=0.593, most=9.0)
"""The same run at shorter prompts, with floors: heads then keep a larger share of the prompt."""
FITTED_ON = "benchmarks/results/lengths-judged.json"

_KIND_SAMPLES = 2  # held-out texts of a kind at another length: one knows no spread of its own
_LONGEST_UNASKED = 32 * 1024


@dataclass(frozen=True)
class LossAt:
    """What a plan loses on prompts of another length.

    Args:
        prompt_tokens: of each.
        kl: nats/token: live with a 95 % interval over samples, fitted with one that holds 80 % of
            plans, or a stand-in's band.
        samples: that ran; 0 where none did.
    """

    prompt_tokens: Count
    kl: Estimate
    samples: Whole = 0


def carried_to(kl: Estimate, measured: int, tokens: int) -> LossAt:
    """A loss that was measured on prompts of ``measured`` tokens, foretold at other ``tokens``.

    Of a stand-in's band, which has no value that counts, both ends are carried.
    """
    carried = LONGER if tokens > measured else SHORTER
    value, low, high = carried.times(tokens / measured)
    ends = (kl.low, kl.high) if kl.tier == BAND else (kl.value, kl.value)
    tier = BAND if kl.tier == BAND else "fitted"
    there = Estimate(value * kl.value, low * ends[0], high * ends[1], kl.unit, tier)
    return LossAt(tokens, there)


def length_note(at: LossAt, measured: int) -> str:
    """One line on the loss at another length than it was measured at."""
    there, here = format_tokens(measured), format_tokens(at.prompt_tokens)
    if at.samples:
        return (
            f"context: on prompts of {here} the plan loses {figure(at.kl)} nats a token, run on "
            f"{at.samples} held-out samples; other figures are of prompts of {there}."
        )
    longer = at.prompt_tokens > measured
    budgets = "shares of the prompt" if longer else f"as many tokens as of prompts of {there}"
    return (
        f"context: quality was measured on prompts of {there}. On those of {here}, of which heads "
        f"keep {budgets}, {at.kl.low:.2g} to {at.kl.high:.2g} nats a token are expected: 80 % of "
        f"plans kept within that factor on smollm2-135m, 512 to 8k tokens ({FITTED_ON}). "
        "--lengths runs the plan there, where weights are at hand."
    )


def lengths_to_run(request: SearchRequest, device: str, measured: int, context: int) -> list[int]:
    """Prompt lengths that the chosen plan runs at, beside that of the samples.

    Those that were asked for; where none were, on a GPU that of the plan's own prompts, which on a
    CPU would take longer than the search.
    """
    if request.lengths is not None:
        return [tokens for tokens in request.lengths if tokens != measured]
    unasked = device.startswith("cuda") and context <= _LONGEST_UNASKED
    return [context] if unasked and context != measured else []


def run_at(
    policy: Policy,
    loaded: LoadedModel,
    request: SearchRequest,
    tokens: int,
    progress: Progress,
    *,
    stored_alike: bool = False,
) -> LossAt:
    """The plan run live on held-out samples with prompts of ``tokens``.

    Raises:
        KvtuneError: there is not enough text, or memory, for samples of that length.
    """
    import torch

    from kvtune.traces.workloads import build, named_workload
    from kvtune.tuner.validate import validate_policy

    workload = named_workload(request.workload, request.seed, request.texts)
    held_out = {kind: _KIND_SAMPLES for kind, count in workload.counts["evaluate"].items() if count}
    longer = replace(workload, counts={"evaluate": held_out}, tokens=tokens + workload.observed)
    samples = build(longer, loaded.tokenizer)
    progress.note(f"running the plan on prompts of {format_tokens(tokens)}")
    try:
        found = validate_policy(
            policy, loaded, samples, stored_alike=stored_alike, progress=progress
        )
    except torch.OutOfMemoryError as error:
        raise KvtuneError(f"memory does not hold prompts of {format_tokens(tokens)}") from error
    return LossAt(tokens, found.live, len(samples))


def losses_at(
    policy: Policy,
    loaded: LoadedModel,
    request: SearchRequest,
    lengths: list[int],
    progress: Progress,
    *,
    stored_alike: bool = False,
) -> Iterator[LossAt]:
    """Each length at which the plan could be run; a search is not lost with one that fails."""
    for tokens in lengths:
        try:
            yield run_at(policy, loaded, request, tokens, progress, stored_alike=stored_alike)
        except KvtuneError as error:
            progress.note(f"prompts of {format_tokens(tokens)} were not run: {error}")
