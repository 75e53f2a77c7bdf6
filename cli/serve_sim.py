"""``kvtune serve-sim``: requests served under a policy, simulated one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.serving.report import Goals, Served
    from kvtune.simulator.serving.requests import Requests
    from kvtune.simulator.serving.server import Server

LEFT_OUT = (
    "left out: network, tokeniser and the scheduler's own time, outputs that end early, evicting "
    "while decoding; memory is taken at its middle value (docs/serve-sim.md)"
)


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
HostMemOption = Annotated[
    str | None,
    typer.Option(
        "--host-mem",
        metavar="SIZE",
        help="Host memory that preempted sequences move to; left out: they are read anew.",
    ),
]


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    gpus: options.Gpus = 1,
    mem: options.Memory = None,
    policy: options.PolicyBeside = None,
    rate: RateOption = None,
    requests: RequestsOption = 10_000,
    prompt: PromptOption = "2k",
    output: OutputOption = "256",
    length_cv: LengthCvOption = 0.0,
    burstiness: BurstinessOption = 1.0,
    prefix: PrefixOption = None,
    arrivals: ArrivalsOption = None,
    slo_ttft: SloTtftOption = None,
    slo_tpot: SloTpotOption = None,
    weights: options.Weights = "auto",
    max_sequences: MaxSequencesOption = 256,
    max_batched_tokens: MaxBatchedTokensOption = 2048,
    order: OrderOption = "arrival",
    block: BlockOption = 16,
    host_mem: HostMemOption = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve requests that arrive over time, simulated."""
    from kvtune.common.units import parse_bytes, parse_seconds
    from kvtune.simulator.serving.engine import serve
    from kvtune.simulator.serving.report import Goals
    from kvtune.simulator.serving.server import server
    from kvtune.simulator.serving.step import Limits
    from kvtune.simulator.serving.times import prepare
    from kvtune.tuner.target import read_gpu, read_model

    _, shape = read_model(model)
    card = read_gpu(gpu)
    goals = Goals(*(None if text is None else parse_seconds(text) for text in (slo_ttft, slo_tpot)))
    asked = _requests(
        arrivals, rate, requests, prompt, output, length_cv, burstiness, prefix, shape, seed
    )
    serving = server(
        shape,
        card,
        card.visible_bytes if mem is None else parse_bytes(mem),
        weights,
        Limits(max_sequences, max_batched_tokens, order),
        block_tokens=block,
        host_bytes=0 if host_mem is None else parse_bytes(host_mem),
        gpus=gpus,
    )
    policies = [None] if policy is None else [None, _policy(policy, shape)]
    with speaking(as_json, quiet) as out:
        found = [
            serve(prepare(serving, asked, each), asked, goals)
            for each in out.progress.track(policies, "serving", len(policies))
        ]
        out.show(_table(serving, asked, found), LEFT_OUT)
        out.finish("serve-sim", _answer(serving, asked, found, goals, seed))


def _requests(
    arrivals: Path | None,
    rate: float | None,
    count: int,
    prompt: str,
    output: str,
    length_cv: float,
    burstiness: float,
    prefix: str | None,
    shape: ModelShape,
    seed: int,
) -> Requests:
    """Drawn, or from a file."""
    from kvtune.common.errors import KvtuneError
    from kvtune.common.units import parse_tokens
    from kvtune.simulator.serving.requests import Lengths, generate
    from kvtune.simulator.serving.requests_file import read_requests

    if (arrivals is None) == (rate is None):
        raise KvtuneError(
            "requests come either at a rate or from a file",
            hint="give --rate 4, or --arrivals FILE.",
        )
    if arrivals is not None:
        return read_requests(arrivals)
    if not rate or rate <= 0:
        raise KvtuneError(f"--rate {rate} is not above zero", hint="--rate 4 is 4 a second.")
    return generate(
        count,
        rate,
        Lengths.parse(prompt, length_cv),
        Lengths.parse(output, length_cv),
        longest=shape.max_context,
        burstiness=burstiness,
        prefix_tokens=0 if prefix is None else parse_tokens(prefix),
        seed=seed,
    )


def _policy(path: Path, shape: ModelShape) -> Any:
    from kvtune.cli.inputs import read_policy_input

    return read_policy_input(path).bind(shape.layers, shape.kv_heads)


def _table(serving: Server, asked: Requests, found: list[Served]) -> RenderableType:
    from kvtune.cli.output import table
    from kvtune.common.units import format_bytes
    from kvtune.common.words import count, figure

    words = {
        "ttft_p50": "first token, p50", "ttft_p90": "first token, p90",
        "ttft_p99": "first token, p99", "tpot_p50": "time per token, p50",
        "tpot_p90": "time per token, p90", "tpot_p99": "time per token, p99",
        "queue_time_mean": "wait in queue, mean", "tokens_per_second": "tokens/s",
        "requests_per_second": "requests/s", "goodput": "goodput, requests/s",
        "share_within_slo": "share within SLO", "mean_running": "running, mean",
        "mean_waiting": "waiting, mean", "peak_memory": "cache, peak",
        "mean_memory": "cache, mean",
    }  # fmt: skip
    rows = [
        (
            word,
            *(figure(each.figures[name] if each.finished else None, tier=False) for each in found),
        )
        for name, word in words.items()
        if name in found[0].figures
    ]
    rows += [
        ("tier of all times", *(each.figures["ttft_p50"].tier for each in found)),
        ("finished", *(f"{count(each.finished)} of {count(each.requests)}" for each in found)),
        *_refused(found),
        ("preemptions", *(_preemptions(each) for each in found)),
        ("prompt tokens shared", *(count(each.shared_tokens) for each in found)),
    ]
    return table(
        f"{serving.shape.name} ({serving.weights}) on {_cards(serving)} serves {asked.source}",
        ("", *(each.name for each in found)),
        rows,
        caption=f"cache memory {figure(serving.cache)}{_each(serving)} in "
        f"{count(found[0].blocks)} blocks of {format_bytes(found[0].block_bytes)}; "
        "intervals: all times at their low or high ends",
    )


def _cards(serving: Server) -> str:
    return serving.gpu.name if serving.gpus == 1 else f"{serving.gpus} x {serving.gpu.name}"


def _each(serving: Server) -> str:
    return "" if serving.gpus == 1 else " of each card"


def _refused(found: list[Served]) -> list[tuple[str, ...]]:
    from kvtune.common.words import count

    reasons = dict.fromkeys(reason for each in found for reason in each.refused)
    return [
        (f"refused: {reason}", *(count(each.refused.get(reason, 0)) for each in found))
        for reason in reasons
    ]


def _preemptions(each: Served) -> str:
    from kvtune.common.words import count

    moved = f", {count(each.swaps)} to the host" if each.host_blocks else ""
    return count(each.preemptions) + moved


def _answer(
    serving: Server, asked: Requests, found: list[Served], goals: Goals, seed: int
) -> dict[str, Any]:
    limits = serving.limits
    return {
        "model": serving.shape.name,
        "gpu": serving.gpu.slug,
        "gpus": serving.gpus,
        "weight_format": serving.weights,
        "cache": serving.cache,
        "requests": {"source": asked.source, "count": len(asked), "seed": seed},
        "engine": {
            "max_sequences": limits.sequences,
            "max_batched_tokens": limits.step_tokens,
            "order": limits.order,
            "block_tokens": serving.block_tokens,
            "host_bytes": serving.host_bytes,
        },
        "slo": goals,
        "left_out": LEFT_OUT,
        "policies": found,
    }
