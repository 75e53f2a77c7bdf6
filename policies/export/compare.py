"""What a policy becomes on every stack, beside the policy itself and the uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.words import figure
from kvtune.policies.export.contract import exporters
from kvtune.policies.export.plan import Plan, plan_of
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import ModelFacts, PolicyDocument
from kvtune.policies.servable import check_servable

NOT_THE_PLANS = "not the plan's"
"""The loss on a stack that runs another policy than the plan, which nobody has predicted."""


@dataclass(frozen=True)
class Compared:
    """One way to serve.

    Args:
        name: of the stack, as ``--to`` takes it.
        prompt_bytes: of one prompt there; None where it cannot be exported.
        sequences: at once; None where nobody says.
        loss: what is known of it, in words.
        proof: how far it was tried.
    """

    name: str
    prompt_bytes: int | None
    sequences: int | None
    loss: str
    proof: str


def compared(
    document: PolicyDocument, facts: ModelFacts | None = None, context_tokens: int | None = None
) -> list[Compared]:
    """The uncompressed cache, the plan in kvtune's own pages, then every stack by name.

    Raises:
        KvtuneError: the document does not say which model it is for.
    """
    plan = plan_of(document, "", facts, context_tokens, None)
    full = Policy.uniform(Option(), plan.facts.layers, plan.facts.kv_heads)
    loss = _loss_of_plan(document)
    ours = [
        Compared("uncompressed", *_own(plan, full), "0", "exact"),
        Compared("kvtune", *_own(plan, plan.policy), loss, _proof(plan)),
    ]
    return ours + [_on(name, document, facts, context_tokens) for name in sorted(exporters())]


def _proof(plan: Plan) -> str:
    """By what kvtune serves it: the vLLM plugin refuses what holds more than pages."""
    try:
        check_servable(plan.policy, plan.facts.head_dim)
    except KvtuneError:
        return "runtime"
    return "runtime, and vLLM by plugin"


def _own(plan: Plan, policy: Policy) -> tuple[int, int | None]:
    """Bytes of one prompt, and sequences that fit with their answers in 16 bits."""
    facts = plan.facts
    size = policy.footprint(plan.context_tokens, facts.head_dim)
    if plan.room_bytes is None:
        return size, None
    answer = plan.sequence_tokens - plan.context_tokens
    token = 2 * 2 * facts.layers * facts.kv_heads * facts.head_dim
    return size, plan.room_bytes // (size + answer * token)


def _on(
    name: str,
    document: PolicyDocument,
    facts: ModelFacts | None,
    context_tokens: int | None,
) -> Compared:
    kind = exporters()[name]
    try:
        made = kind().export(
            document, facts=facts, context_tokens=context_tokens, allow_stand_in=True
        )
    except KvtuneError as error:
        return Compared(name, None, None, str(error), kind.proof)
    told = _told(made.loss) if made.keeps_loss else NOT_THE_PLANS
    return Compared(name, made.prompt_bytes, made.sequences, told, made.proof)


def _loss_of_plan(document: PolicyDocument) -> str:
    quality = document.provenance.quality if document.provenance else None
    return _told(quality.kl_nats_per_token if quality else None)


def _told(loss: Estimate | None) -> str:
    return figure(loss) if loss else "not known"
