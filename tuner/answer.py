"""Builds the SearchResult from the chosen candidate: checked, compared, costed, with notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import kvtune
from kvtune.common.estimate import BAND, Estimate
from kvtune.common.progress import Progress
from kvtune.common.units import format_bytes, format_tokens
from kvtune.policies.host_pages import host_sequence_bytes
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.simulator.cost import Cost, policy_cost
from kvtune.tuner.baselines import COSTS
from kvtune.tuner.candidate import Candidate
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.explore.record import selection_split
from kvtune.tuner.lengths import (
    RUNS_THERE,
    Elsewhere,
    LossAt,
    alike,
    carried_to,
    failed_note,
    length_note,
    lengths_to_run,
    losses_at,
    nothing_ran_note,
    run_at,
    shares_alone_note,
    without,
)
from kvtune.tuner.live_baselines import Compared, live_baselines, live_on_stack
from kvtune.tuner.on_stack import BytesThere
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import Baseline, FrontPoint, Quality, SearchResult
from kvtune.tuner.rounding import MEASURED, said_of_rounding
from kvtune.tuner.serving_room import Budgets
from kvtune.tuner.solver import Solver
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.stand_in_baselines import stand_in_baselines
from kvtune.tuner.within import stores_alike

if TYPE_CHECKING:
    from kvtune.tuner.timing import Times
    from kvtune.tuner.validate import Validation


@dataclass(frozen=True)
class Found:
    """A finished study with what it was asked and searched on.

    Args:
        request: what was asked.
        budgets: where the memory goes, by format of the weights and context.
        source: of the quality.
        solver: the question, ready to answer.
        study: its key.
        expected: every plan that fits, its loss calibrated.
        notes: what was decided before, each with its reason.
    """

    request: SearchRequest
    budgets: Budgets
    source: QualitySource
    solver: Solver
    study: str
    expected: Sequence[Candidate]
    notes: tuple[str, ...]


def answer(found: Found, chosen: Candidate, progress: Progress) -> SearchResult:
    """The chosen plan checked, beside the baselines, and the front that it stands on."""
    source = found.source
    policy, budget = found.solver.policy(chosen), found.budgets[chosen.place].at(chosen.sequences)
    begin_compiling(found, chosen, progress)
    cost = _cost(found, chosen)
    predicted = _predicted(found, chosen)
    compared, validation, on_stack = _compared(found, chosen, policy, predicted, progress)
    quality = quality_of(predicted, validation)
    if source.beside is not None:
        source.beside.end_helpers()  # other lengths need the memory that their models take
    elsewhere = _elsewhere(found, chosen, policy, quality, progress)
    baselines = tuple(row.baseline for row in compared)
    provenance = _provenance(found, validation)
    rounding = said_of_rounding(provenance, [on_stack or baselines[0], *baselines[1:]])
    if source.beside is not None:
        source.beside.finish(progress)
    times, untimed = _times(found, policy, chosen, cost, progress)
    return SearchResult(
        request=elsewhere.asked,
        budget=budget,
        front=_front_points(found, chosen),
        policy=policy,
        context_tokens=chosen.context,
        prompt_bytes=cost.prompt_bytes,
        sequences=chosen.sequences,
        sequence_bytes=cost.sequence_bytes,
        share=cost.share,
        quality=quality,
        predicted_quality=predicted,
        baselines=baselines,
        policies={str(row.baseline.policy): row.policy for row in compared if row.policy},
        memory=cost.memory,
        latency=cost.latency,
        prefill=cost.prefill,
        compression=cost.compression,
        full_cache_sequences=int(budget.most(None).value),
        full_cache_accuracy=validation.full_cache_accuracy if validation else None,
        counters=validation.counters if validation else {},
        notes=(
            *found.notes,
            *_notes(found, chosen, quality),
            *elsewhere.notes,
            *_costs(found, chosen, baselines),
            *([rounding] if rounding else []),
        ),
        other_lengths=elsewhere.losses,
        provenance=provenance,
        on_stack=on_stack,
        times=times,
        untimed=untimed,
    )


def _compared(
    found: Found, chosen: Candidate, policy: Policy, predicted: Quality, progress: Progress
) -> tuple[Sequence[Compared], Validation | None, Baseline | None]:
    """The plan first and the baselines; how the plan ran live, and as its stack runs it."""
    source = found.source
    if not source.loaded:
        rows = stand_in_baselines(source, found.solver, policy, chosen, predicted.kl)
        return rows, None, None
    ours = source.of_own_runtime
    rows, validation = live_baselines(ours, policy, chosen, ours.loss_of(chosen.choice), progress)
    if not predicted.stack:
        return rows, validation, None
    on_stack, validation = live_on_stack(source, rows[0], chosen, progress)
    return rows, validation, on_stack


def _provenance(found: Found, validation: Validation | None) -> dict[str, Any]:
    """Versions, seeds, hashes; of a model that ran in 16 bits, what rounding makes of losses."""
    floor = validation.rounding if validation else None
    return {
        "kvtune": kvtune.__version__,
        "seed": found.request.seed,
        "study": found.study,
        **found.source.provenance,
        **({} if floor is None else {MEASURED: floor}),
    }


def begin_compiling(found: Found, likely: Candidate, progress: Progress) -> None:
    """Let other processes compile what a plan will be timed with, while this one goes on."""
    loaded, beside = found.source.loaded, found.source.beside
    if loaded is None or beside is None or not beside.compiles_for(loaded.device):
        return
    if _is_timed(found):
        from kvtune.runtime.timing import uncompressed

        policy = found.solver.policy(likely)
        beside.compile([policy, uncompressed(policy)], loaded, progress)


def _is_timed(found: Found) -> bool:
    """Whether the plan is timed at the end: on the GPU that it is for, and with texts to read."""
    return _has_gpu(found) and found.source.trace is not None and _is_for_this_gpu(found)


def _has_gpu(found: Found) -> bool:
    loaded = found.source.loaded
    return loaded is not None and loaded.device.startswith("cuda")


def _is_for_this_gpu(found: Found) -> bool:
    from kvtune.tuner.timing import present_gpu

    return present_gpu() == found.request.gpu


def quality_of(predicted: Quality, validation: Validation | None) -> Quality:
    """The plan's loss as it ran live, where it did."""
    return replace(predicted, kl=validation.live) if validation else predicted


def _elsewhere(
    found: Found, chosen: Candidate, policy: Policy, quality: Quality, progress: Progress
) -> Elsewhere:
    """The plan's loss at other prompt lengths: as it ran there, else at its context as fitted."""
    request, source, context = found.request, found.source, chosen.context
    measured, loaded = source.tables.prompt_tokens, source.loaded
    ran, failed = list[LossAt](), dict[int, str]()
    if loaded is not None:
        alike_stored = stores_alike(request.stack)
        ran, failed = losses_at(
            lengths_to_run(request, loaded.device, measured, context),
            lambda tokens: run_at(
                policy, loaded, request, tokens, progress, stored_alike=alike_stored
            ),
        )
    notes = [length_note(at, measured) for at in ran]
    known = (measured, *(at.prompt_tokens for at in ran))
    if quality.kl.high > 0 and not any(alike(context, tokens) for tokens in known):
        foretold, note = _at_context(found, policy, quality, context)
        ran += foretold
        tried = any(alike(context, tokens) for tokens in failed)
        notes.append(note if tried else f"{note} {RUNS_THERE}")
    notes += [failed_note(tokens, reason) for tokens, reason in failed.items()]
    losses = tuple(sorted(ran, key=lambda at: at.prompt_tokens))
    return Elsewhere(losses, tuple(notes), without(request, failed))


def _at_context(
    found: Found, policy: Policy, quality: Quality, context: int
) -> tuple[list[LossAt], str]:
    """What is foretold of the loss at the plan's context, and a line on it.

    At shorter prompts plans whose heads all have floors were fitted alone.
    """
    shape, measured = found.request.shape, found.source.tables.prompt_tokens
    if context < measured and not all(map(_keeps_tokens, policy.options())):
        return [], shares_alone_note(context, measured)
    held = policy.footprint(measured, shape.head_dim) + policy.host_bytes(measured, shape.head_dim)
    kept = measured * held / shape.kv_bytes(measured)
    at = carried_to(quality.kl, measured, context, kept)
    if at is None:
        return [], nothing_ran_note(context, measured)
    return [at], length_note(at, measured)


def _keeps_tokens(option: Option) -> bool:
    """Whether it keeps of shorter prompts no fewer tokens, as the plans that were fitted did."""
    return option.budget.share is None or option.budget.floor > 0


def _times(
    found: Found, policy: Policy, chosen: Candidate, cost: Cost, progress: Progress
) -> tuple[Times | None, str | None]:
    """As ``kvtune validate`` would time the plan; neither times nor a reason away from GPUs."""
    request, source = found.request, found.source
    loaded, trace = source.loaded, source.trace
    if loaded is None or trace is None or not _has_gpu(found):
        return None, None
    from kvtune.tuner.timing import Served, times_or_reason

    if not _is_for_this_gpu(found):
        return None, f"the GPU of this machine is no {request.gpu.name}, which the plan is for"
    progress.note("running the plan within its limit, and timing it beside the uncompressed cache")
    budget = found.budgets[chosen.place]
    served = Served(
        chosen.sequences, chosen.context, request.generated_tokens, budget.limit_bytes, cost.memory
    )
    return times_or_reason(
        policy, loaded, request.shape, trace.of_split("evaluate"), batch=chosen.sequences,
        context_tokens=chosen.context, served=served if budget.weight_format == "bf16" else None,
    )  # fmt: skip


def _predicted(found: Found, chosen: Candidate) -> Quality:
    """The plan's loss on held-out samples, from the tables."""
    source, stack = found.source, found.request.stack
    return Quality(
        kl=source.loss_of(chosen.choice),
        source="stand-in" if source.stand_in else "own trace",
        stand_in=source.stand_in,
        samples=len(source.tables.of_split("evaluate").samples),
        stack=str(stack) if source.loaded and stores_alike(stack) else "",
    )


def _cost(found: Found, candidate: Candidate) -> Cost:
    there = found.solver.question.bytes_there
    return cost_of(found.budgets, found.solver.policy(candidate), candidate, there)


def cost_of(
    budgets: Budgets, policy: Policy, candidate: Candidate, there: BytesThere | None
) -> Cost:
    """Memory and time with its sequences at once, each as the stack lays it out that it is for."""
    each = None if there is None else there(candidate.choice, candidate.context)
    return policy_cost(policy, budgets[candidate.place].at(candidate.sequences), each_bytes=each)


def _front_points(found: Found, chosen: Candidate) -> tuple[FrontPoint, ...]:
    best = cross_fitted_front(found.source, found.expected)
    shown = {c.number: c for c in (chosen, *best)}.values()
    points = [_front_point(found, each, each.number == chosen.number) for each in shown]
    return tuple(sorted(points, key=lambda p: (p.context_tokens * p.sequences, -p.kl)))


def _front_point(found: Found, candidate: Candidate, chosen: bool) -> FrontPoint:
    cost = _cost(found, candidate)
    return FrontPoint(
        kl=candidate.kl,
        context_tokens=candidate.context,
        sequences=candidate.sequences,
        prompt_bytes=cost.prompt_bytes,
        share=cost.share,
        time_per_token=cost.latency,
        tokens_per_second=cost.tokens_per_second,
        parameters=candidate.parameters,
        chosen=chosen,
        band=band_of(found.source, candidate),
        weights=candidate.weights,
        unseen=candidate.unseen,
    )


def band_of(source: QualitySource, candidate: Candidate) -> Estimate | None:
    """A stand-in's band around what a plan loses on selection samples; None of a model's own."""
    if not source.stand_in:
        return None
    return source.loss_of(candidate.choice, selection_split(source.tables))


def _notes(found: Found, chosen: Candidate, quality: Quality) -> tuple[str, ...]:
    """Automatic choices, each with its reason."""
    request = found.request
    notes = [f"weights: {_weights_reason(found, chosen)}"]
    if request.sequences is None or len(request.contexts) > 1:
        whose = f"{quality.stand_in}'s loss" if quality.stand_in else "loss on selection"
        limit = f"within {request.largest_kl:g} nats a token"
        reason = (
            f"the most tokens at once for which {whose} stays {limit}"
            if chosen.believed <= request.largest_kl
            else f"the least loss found; none stays {limit}"
        )
        tokens = format_tokens(chosen.context)
        notes.append(f"at once: {chosen.sequences} of {tokens}, {reason}; {_room(found, chosen)}.")
    if request.moved_bytes is not None:
        notes.append(_host_note(found, chosen, request.moved_bytes))
    if request.read_bytes is not None:
        policy, shape = found.solver.policy(chosen), request.shape
        read = policy.read_bytes(chosen.context, shape.head_dim)
        notes.append(
            f"reading: a decode step reads {format_bytes(read)} of each sequence's prompt, "
            f"--read-bytes allows {format_bytes(request.read_bytes)}."
        )
    if quality.kl.tier == BAND:
        notes.append(_band_note(request, quality))
    elif quality.kl.value > request.largest_kl:
        notes.append(
            f"loss: {quality.kl.value:.3g} nats a token on held-out samples is above --max-kl "
            f"{request.largest_kl:g}; fewer sequences (--batch) or more --mem lower it."
        )
    return tuple(notes)


def _room(found: Found, chosen: Candidate) -> str:
    """Whether memory holds more of the plan, and who counts."""
    question = found.solver.question.under(chosen.weights)
    most = question.most_of(chosen.context, chosen.choice)
    where = f" as {found.request.stack} lays them out" if question.bytes_there else ""
    if chosen.sequences < most:
        return f"memory holds {most} of this plan{where}"
    return f"memory holds no more of this plan{where}"


def _weights_reason(found: Found, chosen: Candidate) -> str:
    """Why these weights; of several formats, what of them is not counted."""
    formats, largest_kl = found.solver.question.freed, found.request.largest_kl
    if len(formats) == 1:
        return found.budgets[chosen.place].reason
    which = (
        "the widest within" if chosen.believed <= largest_kl else "the least loss; none is within"
    )
    return (
        f"{chosen.weights} of {', '.join(formats)}: {which} {largest_kl:g} nats a token. Losses "
        "are the cache's alone: what narrower weights lose is not known and in no figure. Bytes "
        "and times are counted with each format's own."
    )


def _host_note(found: Found, chosen: Candidate, allowed_bytes: int) -> str:
    """What the plan has on the host."""
    policy, head_dim = found.solver.policy(chosen), found.request.shape.head_dim
    heads = sum(option.on_host for option in policy.options())
    held = host_sequence_bytes(policy, chosen.context, head_dim)
    moved = policy.moved_bytes(chosen.context, head_dim)
    note = (
        f"host: {heads} of {policy.layers * policy.kv_heads} heads lie in the host's memory and "
        f"take {format_bytes(held)} of it for each sequence; a decode step brings over "
        f"{format_bytes(moved)}, --moved-bytes allows {format_bytes(allowed_bytes)}."
    )
    if found.source.stand_in and not heads:
        whole = format_bytes(_kept_bytes(policy, chosen, head_dim))
        note += (
            " A stand-in knows no reader and gives all heads one option, so that a step brings "
            f"over all that is kept of a prompt: here {whole}. With weights (--model PATH) readers "
            "are on the menu, which bring over what they read."
        )
    return note


def _kept_bytes(policy: Policy, chosen: Candidate, head_dim: int) -> int:
    """What a step would bring over if all of the plan's heads lay on the host."""
    there = [replace(option, tier="host") for option in policy.options()]
    planned = policy.budgets(chosen.context).ravel().tolist()
    return sum(
        option.ledger(budget, chosen.context, head_dim).moved_bytes
        for option, budget in zip(there, planned, strict=True)
    )


def _costs(found: Found, chosen: Candidate, baselines: Sequence[Baseline]) -> Iterator[str]:
    """What the plan, where it is a rule, and baselines take that is in no column."""
    rule = found.source.tables.rule_of(chosen.choice)
    if rule is not None and rule.family in COSTS:
        yield f"cost: the plan {COSTS[rule.family]}; --ttft leaves out what takes too long."
    for baseline in baselines:
        if baseline.family in COSTS:
            yield f"cost: {baseline.name} {COSTS[baseline.family]}."


def _band_note(request: SearchRequest, quality: Quality) -> str:
    reaches = "beyond" if quality.kl.high > request.largest_kl else "no higher than"
    return (
        f"loss: {request.shape.name} was not run; the band is what {quality.stand_in} loses over "
        f"samples and kinds of text, widened by what was seen between models. It reaches {reaches} "
        f"--max-kl {request.largest_kl:g}. Options for single heads or layers do not carry over "
        "between models and are not offered; with weights (--model PATH) they are, and the plan is "
        "run."
    )
