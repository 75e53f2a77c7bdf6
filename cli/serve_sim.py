"""``kvtune serve-sim``: requests served under a policy, simulated one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking

if TYPE_CHECKING:
    from kvtune.cli.serve_requests import Drawn
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.serving.requests import Requests

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
        "measured them (pip install 'kvtune\\[aiconfigurator]').",
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


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    gpus: options.Gpus = 1,
    mem: options.Memory = None,
    stack: StackOption = "kvtune",
    policy: options.PolicyBeside = None,
    rate: RateOption = None,
    concurrency: ConcurrencyOption = None,
    requests: RequestsOption = 10_000,
    prompt: PromptOption = "2k",
    output: OutputOption = "256",
    length_cv: LengthCvOption = 0.0,
    burstiness: BurstinessOption = 1.0,
    prefix: PrefixOption = None,
    arrivals: ArrivalsOption = None,
    slo_ttft: SloTtftOption = None,
    slo_tpot: SloTpotOption = None,
    weights: options.Weights = None,
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
    from kvtune.cli.inputs import read_policy_input
    from kvtune.cli.planned import notes_on_model, planned_options
    from kvtune.common.units import parse_bytes, parse_seconds
    from kvtune.tuner.target import read_gpu, read_model

    _, shape = read_model(model)
    card = read_gpu(gpu)
    # What follows takes a while to import, and a misspelt name needs none of it.
    from kvtune.cli.serve_report import answer, left_out, served_table
    from kvtune.cli.serve_requests import Drawn
    from kvtune.simulator.serving.engine import serve
    from kvtune.simulator.serving.report import Goals
    from kvtune.simulator.serving.requests_file import read_requests
    from kvtune.simulator.serving.server import server
    from kvtune.simulator.serving.step import READING, Limits
    from kvtune.simulator.serving.times import prepare

    document = None if policy is None else read_policy_input(policy)
    planned, notes = planned_options(document, weights=weights)
    notes += notes_on_model(document, shape)
    goals = Goals(*(None if text is None else parse_seconds(text) for text in (slo_ttft, slo_tpot)))
    drawn = Drawn(rate, concurrency, requests, prompt, output, length_cv, burstiness, prefix, seed)
    _check_sources(arrivals, drawn)
    asked = drawn.requests(shape) if arrivals is None else read_requests(arrivals)
    serving = server(
        shape,
        card,
        card.visible_bytes if mem is None else parse_bytes(mem),
        planned.get("weights", "auto"),
        Limits(max_sequences, max_batched_tokens, order, READING[stack]),
        block_tokens=block,
        host_bytes=0 if host_mem is None else parse_bytes(host_mem),
        gpus=gpus,
        stack=stack,
    )
    policies = _policies(document, shape)
    notes += _sharing(asked, order, prefix)
    with speaking(as_json, quiet) as out:
        found = [
            serve(prepare(serving, asked, each), asked, goals)
            for each in out.progress.track(policies, "serving", len(policies))
        ]
        out.show(served_table(serving, asked, found), left_out(serving))
        if notes:
            out.show("", *(f"note: {note}" for note in notes))
        out.finish("serve-sim", answer(serving, asked, found, goals, seed, notes))


def _check_sources(arrivals: Path | None, drawn: Drawn) -> None:
    """Refuse requests from more than one place or from none."""
    from kvtune.common.errors import KvtuneError

    given = [each is not None for each in (arrivals, drawn.rate, drawn.concurrency)]
    if sum(given) != 1:
        raise KvtuneError(
            "requests come at a rate, from a number of clients, or from a file",
            hint="give one of --rate 4, --concurrency 32 and --arrivals FILE.",
        )


def _policies(document: PolicyDocument | None, shape: ModelShape) -> list[Policy | None]:
    """The full cache, and the policy that was named."""
    return [None, *([document.bind(shape.layers, shape.kv_heads)] if document else [])]


def _sharing(asked: Requests, order: str, prefix: str | None) -> tuple[str, ...]:
    """What was asked of shared beginnings and has no effect, or on some of the prompts alone."""
    from kvtune.common.words import count

    notes = []
    shorter = sum(each is None for each in asked.prefixes)
    if prefix is not None and shorter:
        of_all = f"{count(shorter)} of {count(len(asked))} prompts"
        notes.append(f"{of_all} are shorter than --prefix {prefix}, and share nothing")
    if order == "cached" and not any(asked.prefixes):
        notes.append("--order cached changes nothing: no prompts are known to begin alike")
    return tuple(notes)
