"""The search, first to last: room for the cache, quality, study, choice, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.simulator.quality.tables import on_both_sides
from kvtune.tuner.answer import Found, answer, band_of, begin_compiling
from kvtune.tuner.asked import facts_of, given, question_of
from kvtune.tuner.beside import Beside, helpers_of
from kvtune.tuner.candidate import Candidate, pick
from kvtune.tuner.checks import check_request, no_head_is_known, scores_of
from kvtune.tuner.cross_fit import cross_fitted_front
from kvtune.tuner.edited import set_aside
from kvtune.tuner.explore.reader import StudyReader
from kvtune.tuner.explore.record import Recorder
from kvtune.tuner.filling import held_by_runtime
from kvtune.tuner.finished import answers_another, finished, keep_finished
from kvtune.tuner.head_points import head_points
from kvtune.tuner.limits import none_within, note_on, within
from kvtune.tuner.live_rules import best_rule
from kvtune.tuner.nothing_fits import nothing_fits
from kvtune.tuner.refine import live_on_selection, recalibrated, refine
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import SearchResult
from kvtune.tuner.run_directory import record_config, write_result
from kvtune.tuner.serving_room import Budgets, budgets_of, notes_on
from kvtune.tuner.simple_points import simple_points
from kvtune.tuner.solver import Solver
from kvtune.tuner.sources import QualitySource
from kvtune.tuner.stand_in_rules import Offer, offers_of, rule_points, said_of_methods
from kvtune.tuner.starts import start_points
from kvtune.tuner.trials import study_trials
from kvtune.tuner.which_menu import with_menu
from kvtune.tuner.which_source import quality_source


def run_search(request: SearchRequest, progress: Progress | None = None) -> SearchResult:
    """Find the best plan, check it, and leave everything in the run directory.

    Raises:
        KvtuneError: nothing fits, the shape cannot be searched, or a file cannot be written.
    """
    progress = progress or Silent()
    check_request(request)
    with locked(request.run_dir), helpers_of(request, progress) as beside:
        request, reason = with_menu(request)  # which may import torch, as helpers do meanwhile
        if (found := _finished(request, progress)) is not None:
            return found
        if reason:
            progress.note(reason)
        return _search(request, progress, beside)


def _finished(request: SearchRequest, progress: Progress) -> SearchResult | None:
    """The answer of the same search, where it has ended before."""
    try:
        found = finished(request)
    except KvtuneError as error:
        progress.note(f"{error}. The search goes on and writes it again.")
        set_aside(request.run_dir)
        return None
    if found is not None:
        progress.note(f"this search has ended before; its answer is read from {request.run_dir}")
        return found
    if not set_aside(request.run_dir) and answers_another(request):
        progress.note(
            f"{request.run_dir} answers another question (other options, texts or results); "
            f"this answer will take its place{_made_before(request.run_dir)}. --run-dir keeps both."
        )
    return None


def _made_before(run_dir: Path) -> str:
    made = [name for name in ("report", "card") if (run_dir / name).exists()]
    if not made:
        return ""
    return f", but not that of its {' and '.join(made)}: make them again"


def _search(request: SearchRequest, progress: Progress, beside: Beside) -> SearchResult:
    budgets = budgets_of(request)
    source, notes = quality_source(request, progress, beside)
    notes = (*notes, *notes_on(request, budgets))
    if request.moved_bytes is not None:
        source = replace(source, tables=on_both_sides(source.tables))
    rules = _rules(request, budgets, source)
    if source.stand_in:
        progress.note(said_of_methods(source.tables, with_rules=request.stack is None))
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

    trials, reason = study_trials(request, solver, facts, record, progress)
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
        raise nothing_fits(request, question)
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
    keep_finished(result)
    _keep_columns(request.run_dir, progress)
    return result


def _keep_columns(run_dir: Path, progress: Progress) -> None:
    """Write what only makes reading faster; without it the search has ended all the same."""
    try:
        StudyReader(run_dir).keep_columns()
    except KvtuneError as error:
        progress.note(f"{error}; plans are read from their lines instead")


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
    # Most searches come to this plan or to one much like it.
    begin_compiling(found, beside, progress)
    rule = best_rule(found, beside, progress)
    if rule is None:
        return found
    source = source.with_rules([rule])
    solver = found.solver.asked(question_of(request, found.budgets, source))
    first = max(candidate.number for candidate in found.expected) + 1
    offer = Offer(rule, beside.context, beside.sequences, beside.weights)
    ruled = within(rule_points(solver, [offer], first))
    return replace(found, source=source, solver=solver, expected=[*found.expected, *ruled])


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
