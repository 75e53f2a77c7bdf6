"""The options that ``kvtune search`` alone has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvtune.cli import options

Gpus = Annotated[
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
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Prompt tokens of a sequence: 8192 or 32k (k is 1024); 4k-64k lets the search "
        "choose among doublings; left out: 8192, or what --generated leaves of a shorter model.",
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        metavar="TOKENS",
        help="Also run the chosen plan on prompts of these lengths: 2k,4k; left out: of --context "
        "on a GPU, of none on a CPU.",
    ),
]
MaxKl = Annotated[
    float,
    typer.Option("--max-kl", metavar="NATS", min=0, max=100, help="Acceptable loss, nats a token."),
]
Stack = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="STACK",
        help="Search inside what a serving stack can express (vllm, llama-cpp... as in "
        "kvtune export --to); left out: any plan, which kvtune's own runtime serves.",
    ),
]
ReadBytes = Annotated[
    str | None,
    typer.Option(
        "--read-bytes",
        metavar="SIZE",
        help="A decode step may read so much of each sequence's prompt: 50MB; heads may then "
        "hold more than they read (quest, landmark; with --menu all every reader).",
    ),
]
Tpot = Annotated[
    str | None,
    typer.Option("--tpot", metavar="TIME", help="Most time of a decode step: 30ms; as predicted."),
]
Ttft = Annotated[
    str | None,
    typer.Option(
        "--ttft",
        metavar="TIME",
        help="Most time for reading and compressing one prompt: 2s, 500ms; as predicted.",
    ),
]
Sequences = Annotated[
    int | None,
    typer.Option(
        "--sequences",
        metavar="N",
        min=1,
        max=options.MOST_SEQUENCES,
        help="That must fit at once, at least; --batch asks for a number itself.",
    ),
]
Sampler = Annotated[
    Literal["tpe", "nsga2", "random"] | None,
    typer.Option(
        "--sampler", help="Which proposes trials; left out: by their number, with the reason."
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        max=1024,
        help="Trials that are proposed together and answered at the same time, one a core.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Share the trials with kvtune worker through a database: "
        "postgresql+psycopg://USER@HOST/DB, sqlite:///FILE, or grpc://HOST:PORT (Optuna's proxy).",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Make trace and tables elsewhere: processes:4 of this host, its GPUs by turns, or a "
        "dask scheduler, tcp://HOST:8786, whose workers share this machine's files. Left out, a "
        "search on a GPU begins helper processes on it where there is room for several.",
    ),
]
Start = Annotated[
    list[Path] | None,
    typer.Option(
        "--start",
        metavar="POLICY",
        help="A policy file or run directory whose plan the search begins with: a published head "
        "pattern (kvtune heads, import-policy), a former search; repeatable.",
    ),
]
MovedBytes = Annotated[
    str | None,
    typer.Option(
        "--moved-bytes",
        metavar="SIZE",
        help="Heads may lie in the host's memory, as long as a decode step brings over no more "
        "than this of each sequence's prompt: 20MB.",
    ),
]
HeldBytes = Annotated[
    str | None,
    typer.Option(
        "--held-bytes",
        metavar="SIZE",
        help="Plan for a long generation: heads go on evicting, and a sequence's cache never holds "
        "more than this: 60MB, or 10% of what the uncompressed cache holds on average.",
    ),
]
Heads = Annotated[
    Path | None,
    typer.Option(
        "--heads",
        metavar="FILE",
        help="Head scores of kvtune heads: plans that follow them are run live beside the others, "
        "where the model's weights are at hand.",
    ),
]
StandIn = Annotated[
    bool, typer.Option("--stand-in", help="Use the packaged tables even if weights are here.")
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where everything goes, and is taken up again; left out: "
        "kvtune-runs/<model>-<gpu>-<mem>, and what else was asked for.",
    ),
]
