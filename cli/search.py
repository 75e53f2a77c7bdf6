"""``kvtune search``: the best plan for a model, a card and a memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvtune.cli import options, search_options
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtune.tuner.request import SearchRequest
    from kvtune.tuner.result import SearchResult
    from kvtune.tuner.which_gpu import Tried


def command(
    model: options.Model,
    gpu: search_options.Gpus = None,
    mem: options.Memory = None,
    context: search_options.Context = None,
    generated: options.Generated = "256",
    batch: options.Sequences = None,
    weights: options.WeightFormats = "auto",
    max_kl: search_options.MaxKl = 0.02,
    trials: options.Trials = 60,
    workload: options.Workload = "small",
    menu: options.Menu = "auto",
    stack: search_options.Stack = None,
    read_bytes: search_options.ReadBytes = None,
    tpot: search_options.Tpot = None,
    ttft: search_options.Ttft = None,
    sequences: search_options.Sequences = None,
    sampler: search_options.Sampler = None,
    jobs: search_options.Jobs = 1,
    storage: search_options.Storage = None,
    engine: search_options.Engine = None,
    start: search_options.Start = None,
    moved_bytes: search_options.MovedBytes = None,
    heads: search_options.Heads = None,
    held_bytes: search_options.HeldBytes = None,
    text: options.Texts = None,
    lengths: search_options.Lengths = None,
    stand_in: search_options.StandIn = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    run_dir: search_options.RunDir = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The best plan for a GPU and a memory limit."""
    from functools import partial

    from kvtune.cli.inputs import check_writable, read_policy_path
    from kvtune.tuner.search_options import search_request

    asked = partial(
        search_request, model, context=context, generated=generated, batch=batch, weights=weights,
        max_kl=max_kl, trials=trials, workload=workload, menu=menu, stack=stack,
        read_bytes=read_bytes, tpot=tpot, ttft=ttft, sequences=sequences, sampler=sampler,
        jobs=jobs, storage=storage, engine=engine,
        start=[read_policy_path(path) for path in start or ()], moved_bytes=moved_bytes,
        heads=heads, texts=text or (), lengths=lengths, stand_in=stand_in, seed=seed, device=device,
    )  # fmt: skip
    requests = _requests(asked, gpu, mem, run_dir)
    check_writable(requests[0].run_dir, "--run-dir")
    with speaking(as_json, quiet) as output:
        if held_bytes is None:
            _search(requests, output)
        else:
            _search_long(requests, held_bytes, run_dir, output)


def _requests(
    asked: Callable[..., SearchRequest], gpu: str | None, mem: str | None, run_dir: Path | None
) -> list[SearchRequest]:
    """The search on the card that is named; on each, where there are several."""
    if gpu is None or not ("," in gpu or gpu.lower() == "any"):
        return [asked(gpu, mem, run_dir=run_dir)]
    from kvtune.cli.case_options import read_cards
    from kvtune.common.units import parse_bytes

    cards = read_cards(gpu, (None, None, None), None if mem is None else parse_bytes(mem), None)
    return [
        asked(
            card.gpu,
            None if mem is None else card.memory_bytes,
            run_dir=run_dir / card.gpu.slug if run_dir else None,
        )
        for card in cards
    ]


def _search(requests: Sequence[SearchRequest], output: Output) -> None:
    from dataclasses import replace

    from kvtune.cli import search_json, search_report
    from kvtune.tuner.target import beyond_length

    tried: list[Tried] | None = None
    if len(requests) > 1:
        tried, result = _smallest(requests, output)
        output.show(search_report.tried_table(tried), "")
    else:
        output.progress.note(search_report.first_words(requests[0]))
        result = _run(requests[0], output)
    request = result.request
    longest = beyond_length(request.shape, result.context_tokens, request.generated_tokens)
    if longest:
        result = replace(result, notes=(*result.notes, longest))
    output.show(*search_report.tables(result))
    output.finish("search", search_json.answer(result) | {"gpus_tried": tried})


def _search_long(
    requests: Sequence[SearchRequest], held_bytes: str, run_dir: Path | None, output: Output
) -> None:
    from dataclasses import replace

    from kvtune.common.errors import KvtuneError
    from kvtune.simulator.memory.weights import listed_formats
    from kvtune.tuner.long.bound import check_fits, read_bound
    from kvtune.tuner.target import read_weights

    request = requests[0]
    several = len(listed_formats(request.weights, request.shape, request.gpu)) > 1
    if several or len(requests) > 1 or len(request.contexts) > 1:
        raise KvtuneError(
            "--held-bytes plans for one card, one context and one format of weights",
            hint="name one --gpu, one --context and one of --weights.",
        )
    if request.lengths:
        raise KvtuneError(
            "--held-bytes plans for answers of its own length, and runs at no other --lengths",
            hint="leave out --lengths.",
        )
    bound = read_bound(held_bytes, request)
    check_fits(bound, request)
    read_weights(request.model)
    if run_dir is None:  # the search without this bound has a folder of its own
        request = replace(request, run_dir=Path(f"{request.run_dir}-held-{held_bytes.lower()}"))
    from kvtune.cli.long_report import tables
    from kvtune.tuner.long.search import run_long_search

    result = run_long_search(request, bound, progress=output.progress)
    output.show(*tables(result, request.run_dir))
    output.finish("search", result.as_dict() | {"run_dir": str(request.run_dir)})


def _smallest(
    requests: Sequence[SearchRequest], output: Output
) -> tuple[list[Tried], SearchResult]:
    from kvtune.tuner.which_gpu import smallest_gpu

    return smallest_gpu(requests, output.progress)


def _run(request: SearchRequest, output: Output) -> SearchResult:
    """The search itself; what it needs takes seconds to import, so nothing else imports it."""
    from kvtune.tuner.search import run_search

    return run_search(request, output.progress)
