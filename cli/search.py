"""``kvtune search``: the best plan for a model, a card and a memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from kvtune.tuner.request import SearchRequest
    from kvtune.tuner.result import SearchResult

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
TrialsOption = Annotated[
    int,
    typer.Option(
        "--trials",
        metavar="N",
        min=1,
        max=100_000,
        help="Trials of the outer study; a stand-in needs none.",
    ),
]
MenuOption = Annotated[
    Literal["three", "all"],
    typer.Option(
        "--menu",
        help="Methods that a head may have: three (snapkv, h2o, streaming_llm), or all that "
        "choose when the prompt is complete; all takes several times as long.",
    ),
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
MovedBytesOption = Annotated[
    str | None,
    typer.Option(
        "--moved-bytes",
        metavar="SIZE",
        help="Heads may lie in the host's memory, as long as a decode step brings over no more "
        "than this of each sequence's prompt: 20MB.",
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
        "kvtune-runs/<model>-<gpu>-<mem>.",
    ),
]


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    mem: options.Memory = None,
    context: ContextOption = "8192",
    generated: options.Generated = "256",
    batch: options.Sequences = None,
    weights: options.Weights = "auto",
    max_kl: MaxKlOption = 0.02,
    trials: TrialsOption = 60,
    workload: options.Workload = "small",
    menu: MenuOption = "three",
    stack: StackOption = None,
    read_bytes: ReadBytesOption = None,
    moved_bytes: MovedBytesOption = None,
    heads: HeadsOption = None,
    text: options.Texts = None,
    stand_in: StandInOption = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    run_dir: RunDirOption = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The best plan for a GPU and a memory limit."""
    from kvtune.cli.inputs import check_writable
    from kvtune.tuner.library import search_request

    request = search_request(
        model,
        gpu,
        mem,
        run_dir=run_dir,
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
        moved_bytes=moved_bytes,
        heads=heads,
        texts=text or (),
        stand_in=stand_in,
        seed=seed,
        device=device,
    )
    check_writable(request.run_dir, "--run-dir")
    with speaking(as_json, quiet) as output:
        _search(request, output)


def _search(request: SearchRequest, output: Output) -> None:
    from dataclasses import replace

    from kvtune.cli import search_json, search_report
    from kvtune.tuner.target import beyond_length

    output.progress.note(search_report.first_words(request))
    result = _run(request, output)
    longest = beyond_length(request.shape, result.context_tokens, request.generated_tokens)
    if longest:
        result = replace(result, notes=(*result.notes, longest))
    output.show(*search_report.tables(result))
    output.finish("search", search_json.answer(result))


def _run(request: SearchRequest, output: Output) -> SearchResult:
    """The search itself; what it needs takes seconds to import, so nothing else imports it."""
    from kvtune.tuner.search import run_search

    return run_search(request, output.progress)
