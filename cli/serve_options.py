"""Options of ``kvtune serve-sim`` alone, with what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RateOption = Annotated[
    float | None, typer.Option("--rate", metavar="R", help="Requests a second, on average.")
]
RequestsOption = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, help="How many are drawn.")
]
PromptOption = Annotated[
    str, typer.Option("--prompt", metavar="TOKENS", help="Prompt tokens: 2k, or 1k-4k.")
]
OutputOption = Annotated[
    str, typer.Option("--output", metavar="TOKENS", help="Tokens of an answer: 256, or 64-512.")
]
LengthCvOption = Annotated[
    float,
    typer.Option(
        "--length-cv",
        metavar="CV",
        min=0,
        help="Spread of both lengths around their means (lognormal); 0: all alike.",
    ),
]
BurstinessOption = Annotated[
    float,
    typer.Option(
        "--burstiness",
        metavar="CV",
        min=0,
        help="Spread of the gaps between arrivals: 0 even, 1 Poisson, more comes in bursts.",
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option("--prefix", metavar="TOKENS", help="Beginning that all prompts share."),
]
ArrivalsOption = Annotated[
    Path | None,
    typer.Option(
        "--arrivals",
        metavar="FILE",
        help="Requests from a .jsonl or .csv file instead: arrival_s, prompt_tokens, "
        "output_tokens.",
    ),
]
SloTtftOption = Annotated[
    str | None,
    typer.Option("--slo-ttft", metavar="TIME", help="Most time to the first token: 1s, 500ms."),
]
SloTpotOption = Annotated[
    str | None,
    typer.Option("--slo-tpot", metavar="TIME", help="Most time a token after it: 50ms."),
]
MaxSequencesOption = Annotated[
    int, typer.Option("--max-sequences", metavar="N", min=1, help="Sequences at once.")
]
MaxBatchedTokensOption = Annotated[
    int,
    typer.Option(
        "--max-batched-tokens",
        metavar="N",
        min=1,
        help="New tokens of a step, read or decoded.",
    ),
]
OrderOption = Annotated[
    Literal["arrival", "cached"],
    typer.Option(
        "--order",
        help="Which waiting request is admitted next: the first to arrive, or the one with the "
        "largest share of its prompt held in the cache (KVShare).",
    ),
]
BlockOption = Annotated[
    int, typer.Option("--block", metavar="TOKENS", min=1, help="Tokens of a block of cache.")
]
StackOption = Annotated[
    Literal["kvtune", "vllm", "sglang", "trtllm"],
    typer.Option(
        "--stack",
        help="Whose kernels and order of work: kvtune's own, or a serving stack's as NVIDIA "
        "measured them (pip install 'kvtune[aiconfigurator]').",
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        metavar="N",
        min=1,
        help="Requests at once instead of a rate: each of N clients asks anew when answered.",
    ),
]
HostMemOption = Annotated[
    str | None,
    typer.Option(
        "--host-mem",
        metavar="SIZE",
        help="Host memory that preempted sequences move to; left out: they are read anew.",
    ),
]
LeftOption = Annotated[
    float | None,
    typer.Option(
        "--left-to-answers",
        metavar="SHARE",
        min=0,
        max=0.9,
        help="Share of the blocks that a new request leaves to the answers of those that run; left "
        "out: a tenth for a policy under --stack vllm, as kvtune's plugin does, else none.",
    ),
]
