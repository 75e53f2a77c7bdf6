"""Options of ``kvtune estimate`` alone, with what their help says."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kvtune.cli import options

GpuOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        "-g",
        metavar="NAMES",
        help="Known cards (kvtune gpus), separated by commas, or any for all of them; left "
        "out: this machine's.",
        autocompletion=options.known_gpus,
    ),
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Prompt tokens of a sequence: 8192 or 32k (k is 1024); several: 8k,32k; left out: "
        "what --policy was planned for, else 8192, or what --generated leaves of a shorter model.",
    ),
]
GeneratedOption = Annotated[
    str | None,
    typer.Option(
        "--generated",
        metavar="TOKENS",
        help="Tokens that each sequence generates, kept in 16 bits; left out: as planned, or 256.",
    ),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="N",
        help="Sequences at once; several: 1,8,32; left out: as planned, else 1.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMATS",
        help=f"{options.SEVERAL_WEIGHTS_HELP} Left out: as planned, else auto.",
    ),
]
EvictsOption = Annotated[
    bool,
    typer.Option(
        "--evicts", help="Its methods go on evicting while tokens are generated, if they can."
    ),
]
PrefixOption = Annotated[
    str,
    typer.Option(
        "--prefix",
        metavar="TOKENS",
        help="First tokens of each prompt whose keys and values are held already, such as a "
        "system prompt that requests share; the prefill reads the others.",
    ),
]
ChunkOption = Annotated[
    str | None,
    typer.Option(
        "--chunk",
        metavar="TOKENS",
        help="Tokens of a prompt that are read at once; left out: all of them.",
    ),
]
PriceOption = Annotated[
    str | None,
    typer.Option(
        "--price-per-hour",
        "--price",
        metavar="PRICE",
        help="What a card costs an hour, in any currency, for the cost of a million generated "
        "tokens; one for all cards, or one for each: 0.35,2.50.",
    ),
]
FormOption = Annotated[
    Literal["table", "csv", "markdown", "json"],
    typer.Option("--format", help="How the answer is printed."),
]
