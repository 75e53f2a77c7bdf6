"""``kvtune estimate``: memory and time of a model on a card, with and without a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking
from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from kvtune.cli.inputs import Target
    from kvtune.policies.document import PolicyDocument
    from kvtune.simulator.cost import Cost
    from kvtune.simulator.deployment import Deployment
    from kvtune.simulator.memory import MemoryBudget


def command(
    model: options.Model,
    gpu: options.Gpu = None,
    gpus: options.Gpus = 1,
    stack: options.Stack = "kvtune",
    gpu_memory: options.GpuMemory = None,
    gpu_bandwidth: options.GpuBandwidth = None,
    gpu_flops: options.GpuFlops = None,
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
    from kvtune.cli.card import read_card
    from kvtune.cli.inputs import read_target
    from kvtune.simulator.deployment import Deployment
    from kvtune.simulator.memory import memory_budget

    card = read_card(gpu, gpu_memory, gpu_bandwidth, gpu_flops)
    target = read_target(model, card, mem, context, generated)
    deployment = Deployment(target.shape, target.gpu, gpus, stack)
    budget = memory_budget(
        deployment.local,
        target.gpu,
        target.memory_bytes,
        context_tokens=target.context_tokens,
        batch=batch,
        weights=weights,
    )
    document = _document(policy)
    costs = _costs(deployment, target, budget, document, evicts)
    with speaking(as_json, quiet) as output:
        output.show(*_tables(budget, costs, document))
        output.finish("estimate", _answer(deployment, target, budget, costs, document))


def _document(path: Path | None) -> PolicyDocument | None:
    from kvtune.cli.inputs import read_policy_path
    from kvtune.policies.document import read_policy

    return None if path is None else read_policy(read_policy_path(path))


def _costs(
    deployment: Deployment,
    target: Target,
    budget: MemoryBudget,
    document: PolicyDocument | None,
    evicts: bool,
) -> dict[str, Cost]:
    from kvtune.simulator.cost import policy_cost

    asked = (target.shape, target.gpu, budget, target.generated_tokens)
    costs = {"full cache": deployment.cost(budget, target.generated_tokens)}
    if document is not None:
        _check_alone(deployment)
        policy = document.bind(target.shape.layers, target.shape.kv_heads)
        costs[policy.name] = policy_cost(policy, *asked, evicts=evicts)
    return costs


def _check_alone(deployment: Deployment) -> None:
    """Refuse a policy over several GPUs or another stack's kernels, which cannot run it."""
    if deployment.gpus > 1 or deployment.stack != "kvtune":
        raise KvtuneError(
            "a policy can be costed on one GPU and with kvtune's own kernels only, as yet",
            hint="leave out --gpus and --stack, or --policy.",
        )


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
    deployment: Deployment,
    target: Target,
    budget: MemoryBudget,
    costs: dict[str, Cost],
    document: PolicyDocument | None,
) -> dict[str, Any]:
    return {
        "model": target.shape.name,
        "gpu": target.gpu.slug,
        "gpus": deployment.gpus,
        "stack": deployment.stack,
        "generated_tokens": target.generated_tokens,
        "budget": budget,
        "quality": _quality(document),
        "policies": [{"name": name, **vars(cost)} for name, cost in costs.items()],
    }
