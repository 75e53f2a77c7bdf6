"""What a policy is costed for: the options given, else what its file says it was planned for."""

from __future__ import annotations

from kvtune.policies.policy_file.document import PolicyDocument, Serving
from kvtune.simulator.memory.plan import MemoryPlan, memory_plan
from kvtune.tuner.target import Target, read_target


def planned_for(
    document: PolicyDocument,
    *,
    model: str | None,
    gpu: str | None,
    mem: str | None,
    context: str | None,
    generated: str | None,
    batch: int | None,
    weights: str | None,
) -> tuple[Target, MemoryPlan]:
    """What is served and the memory budget for it.

    Raises:
        KvtuneError: something is unknown, missing, or does not fit.
    """
    served = document.serving or Serving()
    target = read_target(
        model or (document.model.name if document.model else ""),
        gpu or served.gpu or None,
        mem,
        context or str(served.context_tokens or 8192),
        generated or str(served.generated_tokens or 256),
    )
    budget = memory_plan(
        target.shape,
        target.gpu,
        target.memory_bytes,
        context_tokens=target.context_tokens,
        generated_tokens=target.generated_tokens,
        weights=weights or served.weights or "auto",
    )
    return target, budget.at(batch or served.batch or 1)
