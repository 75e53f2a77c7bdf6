"""``kvtune estimate``: memory and time of a model on a card, with and without a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking

if TYPE_CHECKING:
    from kvtune.cli.inputs import Target
    from kvtune.policies.document import PolicyDocument
    from kvtune.simulator.cost import Cost
    from kvtune.simulator.memory import MemoryBudget


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    mem: options.Memory = None,
    context: options.Context = "8192",
    generated: options.Generated = "256",
    batch: options.Batch = 1,
    weights: options.Weights = "auto",
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy", metavar="FILE", help="A policy file, to show beside the full cache."
        ),
    ] = None,
    evicts: Annotated[
        bool,
        typer.Option(
            "--evicts", help="Its methods go on evicting while tokens are generated, if they can."
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Memory and time on a GPU, nothing is run."""
    from kvtune.cli.inputs import read_target
    from kvtune.simulator.memory import memory_budget

    target = read_target(model, gpu, mem, context, generated)
    budget = memory_budget(
        target.shape,
        target.gpu,
        target.memory_bytes,
        context_tokens=target.context_tokens,
        batch=batch,
        weights=weights,
    )
    document = _document(policy)
    note = _too_long(target)
    costs = _costs(target, budget, document, evicts)
    with speaking(as_json, quiet) as output:
        output.show(*_tables(budget, costs, document), *note)
        output.finish("estimate", _answer(target, budget, costs, document))


def _too_long(target: Target) -> list[str]:
    """A line where prompt and answer together are longer than the model takes."""
    tokens, most = target.context_tokens + target.generated_tokens, target.shape.max_context
    if tokens <= most:
        return []
    return [
        f"note: {tokens:,} tokens of prompt and answer are more than the {most:,} that "
        f"{target.shape.name} takes; --context {max(1, most - target.generated_tokens)} leaves "
        "room for the answer."
    ]


def _document(path: Path | None) -> PolicyDocument | None:
    from kvtune.cli.inputs import read_policy_path
    from kvtune.policies.document import read_policy

    return None if path is None else read_policy(read_policy_path(path))


def _costs(
    target: Target, budget: MemoryBudget, document: PolicyDocument | None, evicts: bool
) -> dict[str, Cost]:
    from kvtune.simulator.cost import full_cost, policy_cost

    asked = (target.shape, target.gpu, budget, target.generated_tokens)
    costs = {"full cache": full_cost(*asked)}
    if document is not None:
        policy = document.bind(target.shape.layers, target.shape.kv_heads)
        costs[policy.name] = policy_cost(policy, *asked, evicts=evicts)
    return costs


def _tables(
    budget: MemoryBudget, costs: dict[str, Cost], document: PolicyDocument | None
) -> list[Any]:
    from kvtune.cli.tables import budget_table, cost_table

    quality = _quality(document)
    return [budget_table(budget, quality), "", cost_table(budget, costs, quality)]


def _quality(document: PolicyDocument | None) -> str:
    """An estimate runs nothing; what is known of the loss is what the file says."""
    known = document.provenance.quality if document and document.provenance else None
    return f"{known}, as its file says" if known else "not estimated here; see kvtune search"


def _answer(
    target: Target,
    budget: MemoryBudget,
    costs: dict[str, Cost],
    document: PolicyDocument | None,
) -> dict[str, Any]:
    return {
        "model": target.shape.name,
        "gpu": target.gpu.slug,
        "generated_tokens": target.generated_tokens,
        "budget": budget,
        "quality": _quality(document),
        "policies": [{"name": name, **vars(cost)} for name, cost in costs.items()],
    }
