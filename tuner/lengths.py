"""What a plan loses on prompts of another length than its loss was measured on.

Budgets are shares of the prompt, and on shorter prompts no fewer tokens than where the plan was
found (``Tables.with_floors``). What then changes with the length was fitted on recorded live runs;
where the model's weights are at hand, the chosen plan can also be run at another length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.common.bounds import Count, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Progress
from kvtune.common.units import format_tokens
from kvtune.common.words import figure
from kvtune.policies.policy import Policy
from kvtune.tuner.target import longest_prompt

if TYPE_CHECKING:
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.workloads import Workload
    from kvtune.tuner.request import SearchRequest


@dataclass(frozen=True)
class Carried:
    """Live loss at another length over that where a plan was found, a power of the lengths' ratio.

    Args:
        power: of the ratio of prompt tokens, for a plan that holds one token.
        by_kept: added to the power for each natural logarithm of the tokens that a plan holds.
        kept: fewest and most tokens that plans held which ran; beyond them the nearer is taken.
        reach: half of the interval that holds 80 % of the plans, as a logarithm.
        most: ratio of lengths, or its inverse, beyond which nothing was run.
    """

    power: float
    reach: float
    most: float
    by_kept: float = 0.0
    kept: tuple[float, float] = (1.0, math.inf)

    def times(self, ratio: float, kept: float) -> tuple[float, float, float]:
        """The factor of the loss and its 80 % interval, at so many times the prompt tokens.

        Args:
            ratio: of prompt tokens, there over where the plan was found.
            kept: bytes that the plan holds of a prompt where it was found, as so many uncompressed
                tokens.
        """
        power = self.power + self.by_kept * math.log(min(max(kept, self.kept[0]), self.kept[1]))
        middle = power * math.log(ratio)
        return tuple(math.exp(middle + side) for side in (0.0, -self.reach, self.reach))  # type: ignore[return-value]


LONGER = Carried(power=-0.2753, reach=0.359, most=9.0)
"""SmolLM2, plans of 3, 6, 12 and 25 % of the bytes from 512 to 8,192 tokens, run at longer prompts.

Fitted and tested, with one length, share or run left out, by ``benchmarks/lengths_judged.py``. A
power that depends on the share or on the tokens kept foretells left-out plans no better.
"""
SHORTER = Carried(power=1.7207, by_kept=-0.2013, kept=(29, 2016), reach=0.434, most=9.0)
"""The same run at shorter prompts, with floors: heads then keep a larger share of the prompt.

The power is 1.0 for plans that hold 29 tokens, 0.19 for those that hold 2,016. A constant factor,
and a power of the length alone, foretell left-out plans worse.
"""
FITTED_ON = "benchmarks/results/lengths-judged.json"
RUN_AT = 448, 8192
"""Fewest and most tokens of the prompts that ran; the longest had 8,064, of samples of 8,192."""

_KIND_SAMPLES = 2  # held-out texts of a kind at another length: one knows no spread of its own
_LONGEST_UNASKED = 32 * 1024
_ALIKE = 1.05  # ratio of lengths that count as one: 8,064 prompt tokens of samples of 8,192


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


def alike(tokens: int, others: int) -> bool:
    """Whether two lengths differ by a twentieth at most, which moves a loss by about 5 %."""
    return max(tokens, others) <= _ALIKE * min(tokens, others)


def carried_to(kl: Estimate, measured: int, tokens: int, kept: float) -> LossAt | None:
    """A loss that was measured on prompts of ``measured`` tokens, foretold at other ``tokens``.

    The interval is that of the factor alone. What the fitted losses were known by is in it: they
    are means over one or two texts a kind. As wide as the loss's own interval it would hold 97 % of
    plans where 80 % are meant (``FITTED_ON``). Of a loss of 0 the own upper end is carried, and of
    a stand-in's band, which has no value that counts, both ends are.

    Args:
        kl: the loss, nats/token.
        measured: prompt tokens of what it was measured on.
        tokens: of the prompts that it is foretold for.
        kept: uncompressed tokens that take the bytes that the plan holds of ``measured`` tokens.

    Returns:
        The loss there; None where no plan was run from such a length at such a length.
    """
    carried = LONGER if tokens > measured else SHORTER
    ratio = tokens / measured
    ends = min(tokens, measured), max(tokens, measured)
    if ends[0] < RUN_AT[0] or ends[1] > RUN_AT[1] or ends[1] > _ALIKE * carried.most * ends[0]:
        return None
    value, low, high = carried.times(ratio, kept)
    least, greatest = (kl.low, kl.high) if kl.tier == BAND else (kl.value, kl.value or kl.high)
    tier = BAND if kl.tier == BAND else "fitted"
    there = Estimate(value * kl.value, low * least, high * greatest, kl.unit, tier)
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
        f"plans kept within that factor on smollm2-135m, 512 to 8k tokens ({FITTED_ON})."
    )


def nothing_ran_note(tokens: int, measured: int) -> str:
    """One line where no plan was run at such lengths, so that no loss is foretold."""
    return (
        f"context: quality was measured on prompts of {format_tokens(measured)}. Nothing was run "
        f"at such lengths as {format_tokens(tokens)}: what the plan loses there is not known."
    )


def shares_alone_note(tokens: int, measured: int) -> str:
    """One line on a plan some of whose heads keep only a share of shorter prompts."""
    return (
        f"context: quality was measured on prompts of {format_tokens(measured)}. Some heads of the "
        f"plan keep a share of shorter prompts without a floor in tokens, and no such plan was "
        f"fitted: what it loses at {format_tokens(tokens)} is not known."
    )


RUNS_THERE = "--lengths runs the plan there, where weights are at hand."


def lengths_to_run(
    request: SearchRequest, device: str, measured: int, context: int
) -> tuple[int, ...]:
    """Prompt lengths that the chosen plan runs at, beside that of the samples.

    Those that were asked for; where none were, on a GPU that of the plan's own prompts, which on a
    CPU would take longer than the search, or what the model leaves beside the observed tokens.
    """
    if request.lengths is not None:
        return tuple(tokens for tokens in request.lengths if tokens != measured)
    if not device.startswith("cuda") or context > _LONGEST_UNASKED:
        return ()
    longest = min(context, longest_prompt(request.shape, _held_out(request).observed))
    return () if alike(longest, measured) else (longest,)


def _held_out(request: SearchRequest) -> Workload:
    """The held-out samples of a search's workload, a few of each kind."""
    from kvtune.traces.workloads import named_workload

    workload = named_workload(request.workload, request.seed, request.texts)
    held_out = {kind: _KIND_SAMPLES for kind, count in workload.counts["evaluate"].items() if count}
    return replace(workload, counts={"evaluate": held_out})


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

    from kvtune.traces.workloads import build
    from kvtune.tuner.validate import validate_policy

    workload = _held_out(request)
    longer = replace(workload, tokens=tokens + workload.observed)
    samples = build(longer, loaded.tokenizer)
    progress.note(f"running the plan on prompts of {format_tokens(tokens)}")
    try:
        found = validate_policy(
            policy, loaded, samples, stored_alike=stored_alike, progress=progress
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        hint = "free some memory, or name a shorter length."
        raise KvtuneError("memory does not hold them", hint=hint) from error
    return LossAt(tokens, found.live, len(samples))


@dataclass(frozen=True)
class Elsewhere:
    """What is known of a plan's loss on prompts of other lengths than it was measured on.

    Args:
        losses: shortest first.
        notes: a line on each, and on each length that did not run.
        asked: the request, without the lengths that failed: it is what the search answers, so that
            the same command tries them again.
    """

    losses: tuple[LossAt, ...]
    notes: tuple[str, ...]
    asked: SearchRequest


def losses_at(
    lengths: Sequence[int], run: Callable[[int], LossAt]
) -> tuple[list[LossAt], dict[int, str]]:
    """The loss at each length that could be run, and why another could not, with what to do.

    Whatever fails here, memory or an error in our own code, comes after a search that may have
    taken an hour, whose answer must not be lost with it.
    """
    ran, failed = list[LossAt](), dict[int, str]()
    for tokens in lengths:
        try:
            ran.append(run(tokens))
        except KvtuneError as error:
            failed[tokens] = f"{error.message.rstrip('.')}; {error.hint or 'nothing is lost.'}"
        except Exception as error:  # of any kind: see above
            failed[tokens] = f"{type(error).__name__}, {str(error)[:200].rstrip('.')}."
    return ran, failed


def failed_note(tokens: int, reason: str) -> str:
    """One line on a length that the plan could not be run at."""
    return (
        f"lengths: the plan was not run on prompts of {format_tokens(tokens)}: {reason} The same "
        f"search with --lengths {tokens} tries it again."
    )


def without(request: SearchRequest, failed: Collection[int]) -> SearchRequest:
    """The request that is answered where some of its lengths could not be run."""
    if request.lengths is None:
        return request
    return replace(request, lengths=tuple(n for n in request.lengths if n not in failed))
