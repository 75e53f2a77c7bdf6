"""The search, first to last: room for the cache, quality, study, choice, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvtune.common.errors import DoesNotFitError, KvtuneError
from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.common.units import format_bytes
from kvtune.simulator.quality.tables import on_both_sides
from kvtune.tuner.answer import Found, answer, band_of
from kvtune.tuner.asked import facts_of, given, question_of
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.checks import check_request, no_head_is_known, scores_of
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.explore.facts import Facts
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.record import Recorder
from kvtune.tuner.filling import held_by_runtime
from kvtune.tuner.finished import answers_another, finished, keep_finished
from kvtune.tuner.head_points import head_points
from kvtune.tuner.idle import notes_on_idle
from kvtune.tuner.limits import none_within, note_on, within
from kvtune.tuner.live_rules import best_rule
from kvtune.tuner.question import Question
from kvtune.tuner.refine import live_on_selection, recalibrated, refine
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.run_directory import record_config, write_result
from kvtune.tuner.samplers import Sampler, choose
from kvtune.tuner.serving_room import (
    Budgets,
    budgets_of,
    notes_on,
)
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.sources import QualitySource, own_trace, stand_in
from kvtune.tuner.stack_formats import with_formats_of
from kvtune.tuner.stand_in_rules import Offer, offers_of, rule_points
from kvtune.tuner.starts import start_points
from kvtune.tuner.study import run_study
from kvtune.tuner.within import limits_of


def run_search(request: SearchRequest, progress: Progress | None = None) -> SearchResult:
    """Find the best plan, check it, and leave everything in the run directory.

    Raises:
        KvtuneError: nothing fits, the shape cannot be searched, or a file cannot be written.
    """
    progress = progress or Silent()
    check_request(request)
    with locked(request.run_dir):
        return _finished(request, progress) or _search(request, progress)


def _finished(request: SearchRequest, progress: Progress) -> SearchResult | None:
    """The answer of the same search, where it has ended before."""
    try:
        found = finished(request)
    except KvtuneError as error:
        progress.note(f"{error}; it is made anew")
        return None
    if found is not None:
        progress.note(f"this search has ended before; its answer is read from {request.run_dir}")
    elif answers_another(request):
        progress.note(
            f"{request.run_dir} answers another question (other options, or edited files); this "
            f"answer will take its place{_made_before(request.run_dir)}. --run-dir keeps both."
        )
    return found


def _made_before(run_dir: Path) -> str:
    made = [name for name in ("report", "card") if (run_dir / name).exists()]
    if not made:
        return ""
    return f", but not that of its {' and '.join(made)}: make them again"


def _search(request: SearchRequest, progress: Progress) -> SearchResult:
    budgets = budgets_of(request)
    source, notes = _quality_source(request, progress)
    notes = (*notes, *notes_on(request, budgets))
    if request.moved_bytes is not None:
        source = replace(source, tables=on_both_sides(source.tables))
    rules = _rules(request, budgets, source)
    source = source.with_rules([each.rule for each in rules])
    question = question_of(request, budgets, source)
    solver = Solver.of(question)
    facts = facts_of(request, budgets, source)
    recorder = Recorder(request.run_dir, facts, source)

    def record(candidate: Candidate) -> None:
        if candidate.misses:
            return
        if not recorder.begun:
            record_config(request)
        recorder.add(candidate)

    trials, reason = _trials(request, solver, facts, record, progress)
    notes = (*notes, *reason)
    simple = simple_points(solver, first=facts.trials)
    simple += rule_points(solver, rules, first=facts.trials + len(simple))
    for point in simple:
        record(point)
    starts = _starts(request, source, solver, first=facts.trials + len(simple))
    for point in starts:
        record(point)
    tried = [*trials, *simple, *starts]
    if not tried:
        raise _nothing_fits(request, question)
    candidates = within(tried)
    if not candidates:
        raise none_within(
            request.limits, tried, request.largest_kl, lambda each: band_of(source, each)
        )
    studied = Found(request, budgets, source, solver, facts.study, candidates, notes)
    by_heads = _by_head_scores(recalibrated(studied, source.calibration))
    for point in by_heads:
        record(point)
    studied = replace(
        studied,
        expected=[*candidates, *within(by_heads)],
        notes=(*notes, *note_on([*tried, *by_heads])),
    )
    studied = _with_rule(studied, progress)
    ended, chosen = _choose(recalibrated(studied, source.calibration), progress)
    if not source.stand_in:  # live rounds have taught it, and others may have tried plans too
        _recorded_anew(recorder, ended)
    result = answer(ended, chosen, progress)
    write_result(result)
    StudyReader(request.run_dir).keep_columns()
    keep_finished(result)
    return result


def _trials(
    request: SearchRequest,
    solver: Solver,
    facts: Facts,
    record: Callable[[Candidate], None],
    progress: Progress,
) -> tuple[list[Candidate], list[str]]:
    """The study's candidates, and why its sampler; none of a stand-in, where nothing is drawn."""
    if not facts.trials:
        return [], []
    sampler = choose(request.sampler, facts.trials)
    journal = request.run_dir / f"study-{facts.study}.journal"
    if request.storage:
        _share_trials(request, solver, facts, sampler.name, journal, progress)
    found = run_study(
        solver,
        trials=facts.trials,
        seed=request.seed,
        journal=journal,
        progress=progress,
        sampler=sampler.name,
        found=record,
        jobs=request.jobs,
    )
    return found, [f"sampler: {sampler.name}, because {sampler.reason}."]


def _share_trials(
    request: SearchRequest,
    solver: Solver,
    facts: Facts,
    sampler: Sampler,
    journal: Path,
    progress: Progress,
) -> None:
    """Let workers on other machines do some of the trials."""
    from kvtune.tuner.worker import publish, share

    shared = publish(request, solver, facts.study, facts.trials, sampler)
    progress.note(f"others can join: kvtune worker --study {request.run_dir}")
    share(shared, solver, journal)


def _starts(
    request: SearchRequest, source: QualitySource, solver: Solver, first: int
) -> list[Candidate]:
    """The plans that the request begins with.

    Raises:
        KvtuneError: there are some, and a stand-in, whose heads are no heads of this model.
    """
    if request.starts and source.stand_in:
        raise no_head_is_known(request)
    return start_points(solver, request.starts, first)


def _by_head_scores(found: Found) -> list[Candidate]:
    """Plans that follow the request's head scores, with as many tokens at once as the pick.

    The pick is that of the study so far, by the rule of its end: live rounds only run plans beside
    it that have as many.
    """
    request = found.request
    if request.heads is None:
        return []
    best = pick(cross_fitted_front(found.source, found.expected), request.largest_kl)
    first = max(candidate.number for candidate in found.expected) + 1
    return head_points(found.solver, scores_of(request), best, first)


def _with_rule(found: Found, progress: Progress) -> Found:
    """The study with the rule that live rounds run beside its pick; itself on a stand-in."""
    request, source = found.request, found.source
    if source.stand_in:
        return found
    points = cross_fitted_front(source, recalibrated(found, source.calibration).expected)
    beside = pick(points, request.largest_kl)
    rule = best_rule(found, beside, progress)
    if rule is None:
        return found
    source = source.with_rules([rule])
    solver = found.solver.asked(question_of(request, found.budgets, source))
    first = max(candidate.number for candidate in found.expected) + 1
    offer = Offer(rule, beside.context, beside.sequences, beside.weights)
    ruled = within(rule_points(solver, [offer], first))
    return replace(found, source=source, solver=solver, expected=[*found.expected, *ruled])


def _nothing_fits(request: SearchRequest, question: Question) -> DoesNotFitError:
    """The error that says how many sequences would fit."""
    context = request.context_tokens
    narrowest = question.under(list(question.freed)[-1])
    most = narrowest.most_sequences(context)
    if question.read_budget is not None and most:
        most = narrowest.most_within_reads(context)
        if not most:
            return _reads_too_much(request)
    lower = f"--batch {most} is the most that fits, with every head compressed the furthest; "
    return DoesNotFitError(
        f"no plan fits {request.sequences or 1} sequences of {context} tokens in "
        f"{format_bytes(request.memory_bytes)}",
        hint=(lower if most else "")
        + "raise --mem, shorten --context or take narrower --weights for more.",
    )


def _reads_too_much(request: SearchRequest) -> DoesNotFitError:
    """The error where memory would be enough, and no plan brings over or reads so little."""
    does = f"reads {format_bytes(request.read_bytes or 0)}"
    mend = "raise --read-bytes or shorten --context."
    if request.moved_bytes is not None:
        does = f"brings over {format_bytes(request.moved_bytes)}"
        mend = "raise --moved-bytes or --mem, or shorten --context."
    return DoesNotFitError(
        f"no plan of {request.context_tokens} tokens {does} a step or less", hint=mend
    )


def _quality_source(
    request: SearchRequest, progress: Progress
) -> tuple[QualitySource, tuple[str, ...]]:
    """The model's own trace where its weights are at hand, else the packaged stand-in.

    What is wrong with texts of the user's own is told: a stand-in reads none.
    """
    if not request.has_weights:
        reason = "asked for" if request.stand_in else f"no weights of {request.shape.name} at hand"
        return _stand_in(request, reason)
    try:
        return own_trace(request, progress), ()
    except KvtuneError as error:
        from kvtune.traces.models import KNOWN

        if request.model not in KNOWN or request.texts:
            raise
        return _stand_in(request, str(error))


def _stand_in(request: SearchRequest, reason: str) -> tuple[QualitySource, tuple[str, ...]]:
    source = stand_in(request.shape)
    source = replace(source, tables=with_formats_of(source.tables, limits_of(request.stack)))
    notes = [f"quality: stand-in ({source.stand_in}), because {reason}."]
    if request.menu != "three":
        notes.append("methods: the stand-in's tables know those of --menu three alone.")
    return source, (*notes, *notes_on_idle(request))


def _rules(request: SearchRequest, budgets: Budgets, source: QualitySource) -> list[Offer]:
    """What a stand-in offers beside its options; a stack runs none that divides budgets itself."""
    if not source.stand_in or request.stack is not None:
        return []
    held = held_by_runtime(request.shape.head_dim, request.generated_tokens)
    question = question_of(request, budgets, source)
    return offers_of(question, source.curves, held, request.largest_kl)


def _choose(found: Found, progress: Progress) -> tuple[Found, Candidate]:
    """The front's best; where the model can run, after live rounds on the selection samples."""
    run = live_on_selection(found, progress)
    if run is None:
        points = cross_fitted_front(found.source, found.expected)
        return found, pick(points, found.request.largest_kl)
    return refine(found, run)


def _recorded_anew(recorder: Recorder, found: Found) -> None:
    """The plans' file with what live runs have taught: none of its losses is of another kind."""
    facts = replace(recorder.facts, **given(found.source.tables))
    recorder = Recorder(recorder.path.parent, facts, found.source)
    for candidate in found.expected:
        recorder.add(candidate)
