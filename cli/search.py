"""``kvtune search``: the best plan for a model, a card and a memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtune.tuner.request import SearchRequest
    from kvtune.tuner.result import SearchResult
    from kvtune.tuner.which_gpu import Tried


GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        "-g",
        metavar="NAMES",
        help="A known card (kvtune gpus) or a card's .yaml file; left out: this machine's. Of "
        "several, separated by commas, or any for all: the smallest that does what is asked.",
        autocompletion=options.known_gpus,
    ),
]
ContextOption = Annotated[
    str,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Prompt tokens of a sequence: 8192 or 32k (k is 1024); 4k-64k lets the search "
        "choose among doublings.",
    ),
]
MaxKlOption = Annotated[
    float,
    typer.Option("--max-kl", metavar="NATS", min=0, max=100, help="Acceptable loss, nats a token."),
]
StackOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="STACK",
        help="Search inside what a serving stack can express (vllm, llama-cpp... as in "
        "kvtune export --to); left out: any plan, which kvtune's own runtime serves.",
    ),
]
ReadBytesOption = Annotated[
    str | None,
    typer.Option(
        "--read-bytes",
        metavar="SIZE",
        help="A decode step may read so much of each sequence's prompt: 50MB; heads may then "
        "hold more than they read (quest, landmark; with --menu all every reader).",
    ),
]
TpotOption = Annotated[
    str | None,
    typer.Option("--tpot", metavar="TIME", help="Most time of a decode step: 30ms; as predicted."),
]
TtftOption = Annotated[
    str | None,
    typer.Option(
        "--ttft",
        metavar="TIME",
        help="Most time for reading and compressing one prompt: 2s, 500ms; as predicted.",
    ),
]
SequencesOption = Annotated[
    int | None,
    typer.Option(
        "--sequences",
        metavar="N",
        min=1,
        max=options.MOST_SEQUENCES,
        help="That must fit at once, at least; --batch asks for a number itself.",
    ),
]
SamplerOption = Annotated[
    Literal["tpe", "nsga2", "random"] | None,
    typer.Option(
        "--sampler", help="Which proposes trials; left out: by their number, with the reason."
    ),
]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        max=1024,
        help="Trials that are proposed together and answered at the same time, one a core.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Share the trials with kvtune worker through a database: "
        "postgresql+psycopg://USER@HOST/DB, sqlite:///FILE, or grpc://HOST:PORT (Optuna's proxy).",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Make trace and tables elsewhere: processes:4 of this host, its GPUs by turns, or a "
        "dask scheduler, tcp://HOST:8786, whose workers share this machine's files.",
    ),
]
StartOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--start",
        metavar="POLICY",
        help="A policy file or run directory whose plan the search begins with: a published head "
        "pattern (kvtune heads, import-policy), a former search; repeatable.",
    ),
]
MovedBytesOption = Annotated[
    str | None,
    typer.Option(
        "--moved-bytes",
        metavar="SIZE",
        help="Heads may lie in the host's memory, as long as a decode step brings over no more "
        "than this of each sequence's prompt: 20MB.",
    ),
]
HeldBytesOption = Annotated[
    str | None,
    typer.Option(
        "--held-bytes",
        metavar="SIZE",
        help="Plan for a long generation: heads go on evicting, and a sequence's cache never holds "
        "more than this: 60MB, or 10% of what the uncompressed cache holds on average.",
    ),
]
HeadsOption = Annotated[
    Path | None,
    typer.Option(
        "--heads",
        metavar="FILE",
        help="Head scores of kvtune heads: plans that follow them are run live beside the others, "
        "where the model's weights are at hand.",
    ),
]
StandInOption = Annotated[
    bool, typer.Option("--stand-in", help="Use the packaged tables even if weights are here.")
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where everything goes, and is taken up again; left out: "
        "kvtune-runs/<model>-<gpu>-<mem>, and --context and --for where they are given.",
    ),
]


def command(
    model: options.Model,
    gpu: GpusOption = None,
    mem: options.Memory = None,
    context: ContextOption = "8192",
    generated: options.Generated = "256",
    batch: options.Sequences = None,
    weights: options.WeightFormats = "auto",
    max_kl: MaxKlOption = 0.02,
    trials: options.Trials = 60,
    workload: options.Workload = "small",
    menu: options.Menu = "three",
    stack: StackOption = None,
    read_bytes: ReadBytesOption = None,
    tpot: TpotOption = None,
    ttft: TtftOption = None,
    sequences: SequencesOption = None,
    sampler: SamplerOption = None,
    jobs: JobsOption = 1,
    storage: StorageOption = None,
    engine: EngineOption = None,
    start: StartOption = None,
    moved_bytes: MovedBytesOption = None,
    heads: HeadsOption = None,
    held_bytes: HeldBytesOption = None,
    text: options.Texts = None,
    stand_in: StandInOption = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    run_dir: RunDirOption = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The best plan for a GPU and a memory limit."""
    from functools import partial

    from kvtune.cli.inputs import check_writable, read_policy_path
    from kvtune.tuner.search_options import search_request

    asked = partial(
        search_request,
        model,
        context=context,
        generated=generated,
        batch=batch,
        weights=weights,
        max_kl=max_kl,
        trials=trials,
        workload=workload,
        menu=menu,
        stack=stack,
        read_bytes=read_bytes,
        tpot=tpot,
        ttft=ttft,
        sequences=sequences,
        sampler=sampler,
        jobs=jobs,
        storage=storage,
        engine=engine,
        start=[read_policy_path(path) for path in start or ()],
        moved_bytes=moved_bytes,
        heads=heads,
        texts=text or (),
        stand_in=stand_in,
        seed=seed,
        device=device,
    )
    requests = _requests(asked, gpu, mem, run_dir)
    check_writable(requests[0].run_dir, "--run-dir")
    with speaking(as_json, quiet) as output:
        if held_bytes is None:
            _search(requests, output)
        else:
            _search_long(requests, held_bytes, output)


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


def _search_long(requests: Sequence[SearchRequest], held_bytes: str, output: Output) -> None:
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
    bound = read_bound(held_bytes, request)
    check_fits(bound, request)
    read_weights(request.model)
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
