"""``kvtune simulate``: one policy replayed on a trace, with its memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import Output, speaking

if TYPE_CHECKING:
    from kvtune.cli.replayed import Replayed
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.simulator.cost import Cost
    from kvtune.simulator.memory.plan import MemoryPlan
    from kvtune.traces.trace import Trace

_HINT = "capture one first: kvtune capture --model NAME --out DIR, then --trace DIR."


TraceOption = Annotated[
    Path | None, typer.Option("--trace", metavar="DIR", help="What kvtune capture wrote.")
]
SplitOption = Annotated[
    Literal["search", "select", "evaluate", "all"],
    typer.Option("--split", help="Samples to replay; evaluate are those held out."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="NAME", help="Left out: the file's own.")
]
GeneratedOption = Annotated[
    str | None,
    typer.Option("--generated", metavar="TOKENS", help="Left out: the file's own, else 256."),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", min=1, help="Left out: the file's own, else 1."),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", metavar="FORMAT", help="Left out: the file's own.")
]


def command(
    policy: options.PolicyFile,
    trace: TraceOption = None,
    split: SplitOption = "evaluate",
    model: ModelOption = None,
    gpu: options.Gpu = None,
    mem: options.Memory = None,
    context: options.PlannedContext = None,
    generated: GeneratedOption = None,
    batch: BatchOption = None,
    weights: WeightsOption = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Replay one policy on a trace: loss, memory, time."""
    from kvtune.cli.inputs import read_policy_input

    document = read_policy_input(policy)
    recorded = _open(trace)
    from kvtune.cli.serving import planned_for  # takes a while to import: files are read first
    from kvtune.simulator.cost import policy_cost

    target, budget = planned_for(
        document,
        model=model or (None if document.model else str(recorded.manifest["model"]["name"])),
        gpu=gpu, mem=mem, context=context, generated=generated, batch=batch, weights=weights,
    )  # fmt: skip
    bound = document.bind(target.shape.layers, target.shape.kv_heads)
    cost = policy_cost(bound, budget)
    with speaking(as_json, quiet) as output:
        from kvtune.cli.replayed import replay
        from kvtune.traces.models import best_device

        found = replay(recorded, bound, target, split, device or best_device(), output.progress)
        _report(output, document, found, cost, budget)
        if target.notes:
            output.show("", *(f"note: {note}" for note in target.notes))
        answer = _answer(document, found, cost) | {"gpu": target.gpu.slug, "budget": budget}
        answer |= {"notes": target.notes}
        output.finish("simulate", answer)


def _open(folder: Path | None) -> Trace:
    from kvtune.common.errors import KvtuneError
    from kvtune.traces.trace import open_trace

    if folder is None:
        raise KvtuneError("a policy is simulated on a trace, and none was given", hint=_HINT)
    return open_trace(folder)


def _report(
    output: Output, document: PolicyDocument, found: Replayed, cost: Cost, budget: MemoryPlan
) -> None:
    from kvtune.cli.output import table
    from kvtune.cli.tables import cost_table
    from kvtune.common.words import figure

    losses = zip(found.samples, found.kl, strict=True)
    rows: list[tuple[str, ...]] = [(s.id, s.kind, f"{loss:.3g}") for s, loss in losses]
    rows.append(("mean over kinds", "", figure(found.estimate)))
    name = document.policy.name or "policy"
    output.show(
        table(
            f"Loss of {name} on {found.trace}",
            ("sample", "kind", "KL nats/token"),
            rows,
            left=(0, 1),
            caption=f"quality: {found.quality}, 95 % interval over samples",
        ),
        "",
        cost_table(budget, {name: cost}, str(found.quality)),
    )


def _answer(document: PolicyDocument, found: Replayed, cost: Cost) -> dict[str, Any]:
    from kvtune.policies.policy_file.document import as_plain

    return {
        "policy": as_plain(document),
        "quality": found.as_dict(),
        "trace": {"path": found.trace, "model": found.model, "sha256": found.sha256},
        **vars(cost),
    }
