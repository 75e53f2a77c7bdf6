"""``kvtune export``: a policy as the configuration of a serving stack, and what that loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking, table
from kvtune.cli.wording import PROOF
from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.policies.export.contract import Export
    from kvtune.policies.policy_file.document import ModelFacts, PolicyDocument


ToOption = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="STACK",
        help="transformers, kvpress, vllm, lmcache, llama-cpp, ik-llama, sglang, tensorrt-llm, "
        "lmdeploy, ollama, openvino or mlx.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for the files.")
]
CompareOption = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Write nothing; show bytes, sequences and loss on every stack, beside the plan "
        "and the uncompressed cache.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="NAME", help="Path or name that the stack loads."),
]
BatchOption = Annotated[
    int | None, typer.Option("--batch", metavar="N", min=1, help="Left out: the file's own.")
]
AllowStandInOption = Annotated[
    bool,
    typer.Option("--allow-stand-in", help="Export a plan found on another model's trace."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse unless everything can be kept.")
]


_FLATTENED = (
    "not the plan's: the stack runs something else in an arithmetic of its own, whose loss is not "
    "known; kvtune search --for STACK finds the best plan that it can run"
)


def command(
    policy: options.PolicyFile,
    to: ToOption = None,
    out: OutOption = None,
    compare: CompareOption = False,
    model: ModelOption = None,
    context: options.PlannedContext = None,
    batch: BatchOption = None,
    allow_stand_in: AllowStandInOption = False,
    strict: StrictOption = False,
    as_json: options.Json = False,
) -> None:
    """A policy as a serving stack's configuration."""
    from kvtune.cli.inputs import check_writable, read_policy_input
    from kvtune.common.units import parse_tokens
    from kvtune.policies.export.contract import find_exporter, write_export
    from kvtune.tuner.flattened import loss_on_stack

    document = read_policy_input(policy)
    if compare:
        return _compare(document, model, context, as_json)
    if to is None or out is None:
        raise KvtuneError(
            "which stack and which folder is not said",
            hint="give --to and --out, or --compare to see all stacks.",
        )
    exporter = find_exporter(to)()
    check_writable(out, "--out")
    made = exporter.export(
        document,
        model=model or "",
        facts=_facts(document, model),
        context_tokens=parse_tokens(context) if context else None,
        batch=batch,
        allow_stand_in=allow_stand_in,
        strict=strict,
        predict=loss_on_stack,
    )
    paths = write_export(made, out)
    with speaking(as_json, quiet=as_json) as output:
        output.show(_report(made), "")
        output.show(*(f"note: {note}" for note in made.notes), *(f"wrote {p}" for p in paths))
        keys = ("stack", "proof", "report", "notes", "quality")
        output.finish("export", {key: getattr(made, key) for key in keys} | {"files": paths})
    return None


def _compare(
    document: PolicyDocument, model: str | None, context: str | None, as_json: bool
) -> None:
    """All stacks beside the plan."""
    from dataclasses import asdict

    from kvtune.common.units import format_bytes, parse_tokens
    from kvtune.policies.export.compare import NOT_THE_PLANS, compared, notes_on_sequences
    from kvtune.tuner.flattened import loss_on_stack

    tokens = parse_tokens(context) if context else None
    rows = compared(document, _facts(document, model), tokens, loss_on_stack)
    notes = notes_on_sequences(document, rows, tokens)
    quality = document.provenance.quality if document.provenance else None
    if quality is not None and quality.edited:
        notes = (*notes, str(quality))
    flattened = any(row.loss == NOT_THE_PLANS for row in rows)
    with speaking(as_json, quiet=as_json) as output:
        output.show(
            table(
                f"{document.policy.name or 'the policy'} on every stack",
                ("served by", "one prompt", "fit at once", "loss, nats/token", "proof"),
                [
                    (
                        row.name,
                        "-" if row.prompt_bytes is None else format_bytes(row.prompt_bytes),
                        "-" if row.sequences is None else str(row.sequences),
                        row.loss,
                        row.proof,
                    )
                    for row in rows
                ],
                left=(0, 3, 4),
                caption=f"{PROOF}\n{_FLATTENED}" if flattened else PROOF,
            ),
            *(f"note: {note}" for note in notes),
        )
        output.finish("export", {"compared": [asdict(row) for row in rows], "notes": notes})


def _facts(document: PolicyDocument, model: str | None) -> ModelFacts | None:
    """What the policy file leaves open of its model; of one that it names, if it is known."""
    from kvtune.profiles.models import find_model
    from kvtune.simulator.model_facts import model_facts
    from kvtune.tuner.target import read_model

    if document.model is None:
        return model_facts(read_model(model)[1]) if model else None
    try:
        facts = model_facts(find_model(document.model.name))
    except KvtuneError:
        return None  # a model of the user's own
    same = (facts.layers, facts.kv_heads, facts.head_dim)
    of_file = (document.model.layers, document.model.kv_heads, document.model.head_dim)
    return facts if same == of_file else None


def _report(made: Export) -> RenderableType:
    return table(
        f"Export to {made.stack}",
        ("field", "status", "what became of it"),
        [(line.field, line.status, line.detail) for line in made.report],
        left=(0, 1, 2),
        caption=f"proof: {made.proof}; quality: {made.quality}",
    )
