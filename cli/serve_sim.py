"""``kvtune serve-sim``: requests served under a policy, simulated one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking

if TYPE_CHECKING:
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
    from kvtune.cli.serve_report import LEFT_OUT, answer, served_table
    from kvtune.simulator.serving.engine import serve
    from kvtune.simulator.serving.report import Goals
    from kvtune.simulator.serving.server import server
    from kvtune.simulator.serving.step import Limits
    from kvtune.simulator.serving.times import prepare

    document = None if policy is None else read_policy_input(policy)
    planned, notes = planned_options(document, weights=weights)
    notes += notes_on_model(document, shape)
    goals = Goals(*(None if text is None else parse_seconds(text) for text in (slo_ttft, slo_tpot)))
    asked = _requests(
        arrivals, rate, requests, prompt, output, length_cv, burstiness, prefix, shape, seed
    )
    serving = server(
        shape,
        card,
        card.visible_bytes if mem is None else parse_bytes(mem),
        planned.get("weights", "auto"),
        Limits(max_sequences, max_batched_tokens, order),
        block_tokens=block,
        host_bytes=0 if host_mem is None else parse_bytes(host_mem),
        gpus=gpus,
    )
    policies = _policies(document, shape)
    notes += _sharing(asked, order, prefix)
    with speaking(as_json, quiet) as out:
        found = [
            serve(prepare(serving, asked, each), asked, goals)
            for each in out.progress.track(policies, "serving", len(policies))
        ]
        out.show(served_table(serving, asked, found), LEFT_OUT)
        if notes:
            out.show("", *(f"note: {note}" for note in notes))
        out.finish("serve-sim", answer(serving, asked, found, goals, seed, notes))


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
        if prefix is not None:
            raise KvtuneError(
                "--prefix is of requests that are drawn, and --arrivals names a file of them",
                hint="leave out --prefix; the file's prefix_ids say what its prompts share "
                "(docs/serve-sim.md).",
            )
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
