"""``kvtune serve-sim``: requests served under a policy, simulated one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtune.cli import options
from kvtune.cli.output import Output, speaking
from kvtune.cli.serve_options import (
    ArrivalsOption,
    BlockOption,
    BurstinessOption,
    ConcurrencyOption,
    HostMemOption,
    LeftOption,
    LengthCvOption,
    MaxBatchedTokensOption,
    MaxSequencesOption,
    OrderOption,
    OutputOption,
    PrefixOption,
    PromptOption,
    RateOption,
    RequestsOption,
    SloTpotOption,
    SloTtftOption,
    StackOption,
)
from kvtune.cli.stack_options import CacheDtypeOption, ExpertParallelOption

if TYPE_CHECKING:
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.serving.report import Goals
    from kvtune.simulator.serving.requests import Requests
    from kvtune.simulator.serving.server import Server


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    gpus: options.Gpus = 1,
    mem: options.Memory = None,
    stack: StackOption = "kvtune",
    kv_cache_dtype: CacheDtypeOption = None,
    expert_parallel: ExpertParallelOption = 1,
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
    left_to_answers: LeftOption = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve requests that arrive over time, simulated."""
    from kvtune.cli.inputs import read_policy_input
    from kvtune.cli.planned import notes_on_model, planned_options
    from kvtune.tuner.target import read_gpu, read_model

    _, shape = read_model(model)
    card = read_gpu(gpu)
    # What follows takes a while to import, and a misspelt name needs none of it.
    from kvtune.cli.serve_engine import EngineTyped
    from kvtune.cli.serve_requests import Drawn, read_goals, sharing_notes

    document = None if policy is None else read_policy_input(policy)
    planned, notes = planned_options(document, weights=weights)
    goals = read_goals(slo_ttft, slo_tpot)
    drawn = Drawn(rate, concurrency, requests, prompt, output, length_cv, burstiness, prefix, seed)
    asked = drawn.or_from(arrivals, shape)
    typed = EngineTyped(
        mem, planned.get("weights", "auto"), gpus, stack, kv_cache_dtype, expert_parallel,
        max_sequences, max_batched_tokens, order, block, host_mem, left_to_answers,
    )  # fmt: skip
    serving = typed.server(shape, card)
    policies = _policies(document, shape)
    notes += notes_on_model(document, shape) + sharing_notes(asked, order, prefix) + serving.notes
    with speaking(as_json, quiet) as out:
        _answer(out, serving, asked, policies, goals, seed, notes)


def _answer(
    out: Output, serving: Server, asked: Requests, policies: list[Policy | None], goals: Goals,
    seed: int, notes: tuple[str, ...],
) -> None:  # fmt: skip
    """Serve the requests under each policy, and say what came of it."""
    from kvtune.cli.serve_report import answer, left_out, served_table
    from kvtune.simulator.serving.engine import serve
    from kvtune.simulator.serving.times import prepare

    found = [
        serve(prepare(serving, asked, each), asked, goals)
        for each in out.progress.track(policies, "serving", len(policies))
    ]
    out.show(served_table(serving, asked, found), left_out(serving))
    if notes:
        out.show("", *(f"note: {note}" for note in notes))
    out.finish("serve-sim", answer(serving, asked, found, goals, seed, notes))


def _policies(document: PolicyDocument | None, shape: ModelShape) -> list[Policy | None]:
    """The full cache, and the policy that was named."""
    return [None, *([document.bind(shape.layers, shape.kv_heads)] if document else [])]
