"""What a policy becomes on every stack, beside the policy itself and the uncompressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_tokens
from kvtune.common.words import figure
from kvtune.policies.export.contract import Export, exporters
from kvtune.policies.export.plan import Plan, Predict, nobody_predicts, plan_of
from kvtune.policies.paging import Growth, sequence_bytes, waiting_bytes
from kvtune.policies.policy_file.parts import ModelFacts, PolicyDocument, Serving
from kvtune.policies.servable import check_servable

NOTHING = "0"
NOT_THE_PLANS = "not the plan's"
"""The loss on a stack that runs another policy than the plan, which nobody has predicted."""


@dataclass(frozen=True)
class Compared:
    """One way to serve.

    Args:
        name: of the stack, as ``--to`` takes it.
        prompt_bytes: of one prompt there; None where it cannot be exported.
        sequences: that fit at once; None where nobody says.
        loss: what is known of it, in words.
        proof: how far it was tried.
    """

    name: str
    prompt_bytes: int | None
    sequences: int | None
    loss: str
    proof: str


def compared(
    document: PolicyDocument,
    facts: ModelFacts | None = None,
    context_tokens: int | None = None,
    predict: Predict = nobody_predicts,
) -> list[Compared]:
    """The uncompressed cache, the plan in kvtune's own pages, then every stack by name.

    Args:
        document: the plan.
        facts: what it does not say of its model.
        context_tokens: of a prompt; left out, the document's.
        predict: what is lost on stacks that run something else than the plan.

    Raises:
        KvtuneError: the document does not say which model it is for.
    """
    plan = plan_of(document, "", facts, context_tokens, None)
    loss = _loss_of_plan(document)
    ours = [
        Compared("uncompressed", *_full(plan), NOTHING, "exact"),
        Compared("kvtune", *_own(plan), loss, _proof(plan)),
    ]
    there = [_on(name, plan, facts, predict) for name in sorted(exporters())]
    if plan.is_elsewhere:
        there = [replace(row, sequences=None) for row in there]
    return ours + there


def notes_on_sequences(
    document: PolicyDocument, rows: Sequence[Compared], context_tokens: int | None = None
) -> tuple[str, ...]:
    """Why nobody says how many fit, or that the plan was made for fewer."""
    serving = document.serving or Serving()
    planned = serving.context_tokens
    if planned is not None and context_tokens not in (None, planned):
        return (
            f"how many fit at once is not known: the file's memory for caches is what is left "
            f"beside prompts of {format_tokens(planned)}; kvtune estimate --policy FILE --context "
            f"{context_tokens} counts it for this length.",
        )
    most = next((row.sequences for row in rows if row.name == "kvtune"), None)
    if serving.batch is None or most is None or most <= serving.batch:
        return ()
    return (f"planned for {serving.batch} at once.",)


def _proof(plan: Plan) -> str:
    """By what kvtune serves it: the vLLM plugin refuses what holds more than pages."""
    try:
        check_servable(plan.policy, plan.facts.head_dim)
    except KvtuneError:
        return "runtime"
    return "runtime, and vLLM by plugin"


def _full(plan: Plan) -> tuple[int, int | None]:
    """Bytes of one uncompressed prompt, and sequences that fit with their answers."""
    facts = plan.facts
    token = 2 * 2 * facts.layers * facts.kv_heads * facts.head_dim
    size = plan.context_tokens * token
    return size, _fitting(plan, plan.sequence_tokens * token, 0)


def _own(plan: Plan) -> tuple[int, int | None]:
    """Bytes of one prompt as formats count them, and sequences that fit in kvtune's pages."""
    policy, facts, context = plan.policy, plan.facts, plan.context_tokens
    growth = Growth(plan.sequence_tokens - context)
    each = sequence_bytes(policy, context, facts.head_dim, growth)
    whole = 2 * 2 * context * facts.layers * facts.kv_heads * facts.head_dim
    waiting = waiting_bytes(whole, facts.layers) if policy.waits else 0
    return policy.footprint(context, facts.head_dim), _fitting(plan, each, waiting)


def _fitting(plan: Plan, each: int, waiting: int) -> int | None:
    """Sequences of so many bytes in what the file says is left for caches."""
    return None if plan.room_bytes is None else max(plan.room_bytes - waiting, 0) // each


def _on(name: str, plan: Plan, facts: ModelFacts | None, predict: Predict) -> Compared:
    kind = exporters()[name]
    try:
        made = kind().export(
            plan.document,
            facts=facts,
            context_tokens=plan.context_tokens,
            allow_stand_in=True,
            predict=predict,
        )
    except KvtuneError as error:
        return Compared(name, None, None, str(error), kind.proof)
    return Compared(name, made.prompt_bytes, made.sequences, _loss_on(made), made.proof)


def _loss_on(made: Export) -> str:
    """Of what runs there: nothing where it is the whole prompt in 16 bits."""
    if made.whole:
        return NOTHING
    if made.keeps_loss:
        return _told(made.loss)
    if made.wider and made.loss:
        return f"at most {_told(made.loss)}"
    return _told(made.predicted) if made.predicted else NOT_THE_PLANS


def _loss_of_plan(document: PolicyDocument) -> str:
    quality = document.provenance.quality if document.provenance else None
    told = _told(quality.kl_nats_per_token if quality else None)
    return f"less than in {quality.stack}, {told}" if quality and quality.stack else told


def _told(loss: Estimate | None) -> str:
    return figure(loss) if loss else "not known"
