"""``kvtune estimate``: memory and time of a model on cards, with and without a policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import typer

from kvtune.cli import options
from kvtune.cli.estimate_options import (
    BatchOption,
    ChunkOption,
    ContextOption,
    EvictsOption,
    FormOption,
    GeneratedOption,
    GpuOption,
    PrefixOption,
    PriceOption,
    WeightsOption,
)
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.cli.engine_report import Engine
    from kvtune.cli.engine_verdict import Verdict
    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.common.errors import DoesNotFitError
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.simulator.memory.budget import MemoryBudget
    from kvtune.simulator.memory.engine_memory import EngineMemory
    from kvtune.simulator.memory.llama_memory import LlamaMemory
    from kvtune.tuner.cases import Asked, Case


def command(
    model: options.Model,
    gpu: GpuOption = None,
    gpus: options.Gpus = 1,
    total_gpus: options.TotalGpus = None,
    stack: options.Stack = "kvtune",
    engine_args: options.EngineArgs = "",
    engine_version: options.EngineVersion = None,
    gpu_memory: options.GpuMemory = None,
    gpu_bandwidth: options.GpuBandwidth = None,
    gpu_flops: options.GpuFlops = None,
    mem: options.Memory = None,
    context: ContextOption = None,
    generated: GeneratedOption = None,
    batch: BatchOption = None,
    weights: WeightsOption = None,
    policy: options.PolicyBeside = None,
    evicts: EvictsOption = False,
    prefix: PrefixOption = "0",
    chunk: ChunkOption = None,
    price: PriceOption = None,
    form: FormOption = "table",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Memory and time on a GPU, or which GPU is needed."""
    _check_form(form, as_json)
    from kvtune.cli.engine_asked import follow_engine
    from kvtune.cli.engine_report import read_engine
    from kvtune.cli.planned import notes_on_model, planned_options

    figures = gpu_memory, gpu_bandwidth, gpu_flops
    engine = read_engine(stack, engine_args, engine_version)
    kernels, told = _kernels(stack)
    document = _document(policy)
    options, planned = planned_options(
        document, context=context, generated=generated, batch=batch, weights=weights
    )
    served = _USUALLY._replace(**options)
    plain = _asked(model, gpu, figures, mem, served, price)
    notes = (*planned, *notes_on_model(document, plain.shape))
    from kvtune.simulator.latency.chunks import Reading  # what was typed is read before it

    asked = replace(
        plain,
        document=document,
        evicts=evicts,
        gpus=gpus,
        total_gpus=total_gpus,
        stack=kernels,
        told=(*told, *notes),
        reading=Reading.of(prefix, chunk),
    )
    told_flags = bool(engine_args or engine_version)
    told_context = context is not None or _plans_context(document)
    asked = follow_engine(engine, asked, told_flags=told_flags, told_context=told_context)
    with speaking(as_json or form == "json", quiet) as output:
        cases, memory, verdict = _judged(asked, engine)
        if form in ("csv", "markdown"):
            _print_lines(output, form, cases)
            _say_beside(output, asked, verdict)
        else:
            _show(output, asked, cases, memory, verdict)
        output.finish("estimate", _answer(asked, cases, memory, verdict))
    if not any(case.fits for case in _decisive(cases)):
        raise typer.Exit(DOES_NOT_FIT)


DOES_NOT_FIT = 3


def _check_form(form: str, as_json: bool) -> None:
    from kvtune.common.errors import KvtuneError

    if as_json and form in ("csv", "markdown"):
        raise KvtuneError(
            f"--format {form} and --json are two forms of one answer", hint="give one of them."
        )


class _Served(NamedTuple):
    """What is served, as it is written."""

    context: str
    generated: str
    batch: str
    weights: str


_USUALLY = _Served("8192", "256", "1", "auto")


def _plans_context(document: PolicyDocument | None) -> bool:
    return bool(document and document.serving and document.serving.context_tokens)


def _asked(
    model: str,
    gpu: str | None,
    figures: tuple[str | None, str | None, str | None],
    mem: str | None,
    served: _Served,
    price: str | None,
) -> Asked:
    from kvtune.cli.case_options import read_batch, read_cards, read_several
    from kvtune.common.units import parse_bytes, parse_tokens
    from kvtune.simulator.memory.weights import listed_formats
    from kvtune.tuner.target import read_context, read_model

    name, shape = read_model(model)
    cards = read_cards(gpu, figures, None if mem is None else parse_bytes(mem), price)
    from kvtune.tuner.cases import Asked  # takes a while to import, and a mistake needs none of it

    return Asked(
        model=name,
        shape=shape,
        generated_tokens=parse_tokens(served.generated),
        cards=cards,
        contexts=read_several(served.context, "--context", lambda word: read_context(word, shape)),
        batches=read_several(served.batch, "--batch", read_batch),
        weights=listed_formats(served.weights, shape, cards[0].gpu),
        document=None,
        evicts=False,
    )


def _kernels(
    stack: StackChoice | Literal["llama-cpp"],
) -> tuple[StackChoice, tuple[str, ...]]:
    """Whose kernels the times are of: of engines the memory is known without their tables."""
    if stack == "llama-cpp":
        return "kvtune", ("times are kvtune's own: nobody's table has llama.cpp's kernels",)
    if stack != "vllm":
        return stack, ()
    from kvtune.common.errors import KvtuneError
    from kvtune.profiles.elsewhere import require_systems_folder

    try:
        require_systems_folder()
    except KvtuneError as missing:
        return "kvtune", (f"times are kvtune's own: {missing.message}; {missing.hint}",)
    return stack, ()


def _document(path: Path | None) -> PolicyDocument | None:
    from kvtune.cli.inputs import read_policy_input

    return None if path is None else read_policy_input(path)


def _judged(
    asked: Asked, engine: Engine | LlamaEngine | None
) -> tuple[list[Case], EngineMemory | LlamaMemory | str | None, Verdict | None]:
    """All combinations; of a single one the engine's memory, and what it says in kvtune's place.

    Raises:
        DoesNotFitError: a single one cannot fit, and no engine's memory is known.
    """
    from kvtune.cli.engine_report import engine_of
    from kvtune.cli.engine_verdict import judged_each, verdict_of

    if not asked.is_one:
        return judged_each(engine, asked, asked.cases()), None, None
    cases, error = _one(asked)
    memory = engine_of(engine, asked, cases[0])
    verdict = verdict_of(engine, memory, asked, cases[0])
    if error is not None and verdict is None:
        raise error
    if verdict is not None:
        cases = [replace(case, engine_fits=verdict.fits) for case in cases]
    return cases, memory, verdict


def _one(asked: Asked) -> tuple[list[Case], DoesNotFitError | None]:
    """The only combination, and why it has no costs."""
    from kvtune.common.errors import DoesNotFitError

    one = asked.cards[0], asked.contexts[0], asked.batches[0]
    try:
        return asked.of(*one), None
    except DoesNotFitError as error:
        return asked.refused(*one, asked.splits()[0], asked.weights[0], str(error)), error


def _decisive(cases: Sequence[Case]) -> list[Case]:
    """Those of the policy, where one was named; else of the full cache."""
    return [case for case in cases if case.policy == cases[-1].policy]


def _print_lines(output: Output, form: str, cases: Sequence[Case]) -> None:
    from kvtune.cli.sweep_report import as_csv, as_markdown

    print(as_csv(cases) if form == "csv" else as_markdown(cases), file=output.stdout)


def _say_beside(output: Output, asked: Asked, verdict: Verdict | None) -> None:
    """On stderr what lines of figures have no place for: an engine's verdict, and notes."""
    said = [verdict.text] if verdict else []
    said += [f"note: {note}" for note in asked.notes]
    if said and not output.quiet:
        replace(output, stdout=sys.stderr).show(*said)


def _show(
    output: Output,
    asked: Asked,
    cases: Sequence[Case],
    memory: EngineMemory | LlamaMemory | str | None,
    verdict: Verdict | None,
) -> None:
    from kvtune.cli.engine_report import engine_table
    from kvtune.cli.sweep_report import as_table

    quality = _quality(asked)
    if asked.is_one:
        output.show(verdict.text if verdict else _verdict(asked, _decisive(cases)[0]))
        if cases[0].budget is not None:
            output.show("", *_tables(cases[0].budget, cases, quality))
        if memory is not None:
            output.show("", memory if isinstance(memory, str) else engine_table(memory))
    else:
        output.show(as_table(f"Costs of {asked.shape.name}", cases, f"quality: {quality}"))
    if notes := asked.notes:
        output.show("", *(f"note: {note}" for note in notes))


def _tables(budget: MemoryBudget, cases: Sequence[Case], quality: str) -> list[RenderableType]:
    from kvtune.cli.tables import budget_table, cost_table
    from kvtune.common.words import figure

    costs = {case.policy: case.cost for case in cases if case.cost}
    prices = [case.cost_per_million_tokens for case in cases]
    return [
        budget_table(budget, quality),
        "",
        cost_table(budget, costs, quality, [figure(p) for p in prices if p], first_tokens=True),
    ]


def _verdict(asked: Asked, case: Case) -> str:
    """Whether it fits, and what would where it does not."""
    from kvtune.common.units import format_bytes, format_tokens
    from kvtune.common.words import count

    assert case.cost is not None  # noqa: S101 - as above
    at_once = f"{count(case.batch)} x {format_tokens(case.context_tokens)} with the {case.policy}"
    most = case.cost.sequences_that_fit
    if case.fits:
        return f"fits: {at_once}; {count(most)} would fit at once"
    peak = f"{format_bytes(case.cost.memory.value)} of {format_bytes(case.card.memory_bytes)}"
    would = asked.what_would_fit(case)
    mend = f"; what would fit: {', or '.join(would)}" if would else "; no known card is enough"
    return f"does not fit: {at_once} take {peak} at their peak{mend}"


def _would_fit(asked: Asked, case: Case, verdict: Verdict | None) -> Sequence[str]:
    if verdict is not None:
        return verdict.would_fit
    return asked.what_would_fit(case) if asked.is_one and not case.fits else []


def _quality(asked: Asked) -> str:
    """An estimate runs nothing; what is known of the loss is what the file says of its model."""
    from kvtune.cli.planned import other_model

    document = asked.document
    known = document.provenance.quality if document and document.provenance else None
    if not known:
        return "not estimated here; see kvtune search"
    other = other_model(document, asked.shape)
    return f"{known}, as its file says" + (f" of {other}" if other else "")


def _answer(
    asked: Asked,
    cases: Sequence[Case],
    memory: EngineMemory | LlamaMemory | str | None,
    verdict: Verdict | None,
) -> dict[str, Any]:
    from kvtune.cli.engine_report import as_json
    from kvtune.cli.sweep_report import as_rows

    one = asked.is_one
    named = [{"name": case.policy, **vars(case.cost)} for case in cases if one and case.cost]
    decisive = _decisive(cases)
    return {
        "model": asked.shape.name,
        "gpu": asked.cards[0].gpu.slug if one else None,
        "gpus": asked.gpus,
        "total_gpus": asked.total_gpus,
        "stack": asked.stack,
        "generated_tokens": asked.generated_tokens,
        "budget": cases[0].budget if one else None,
        "quality": _quality(asked),
        "policies": named if one else None,
        "engine": as_json(memory),
        "fits": any(case.fits for case in decisive),
        "would_fit": _would_fit(asked, decisive[0], verdict),
        "rows": as_rows(cases),
        "notes": asked.notes,
    }
