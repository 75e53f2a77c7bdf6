"""What an exporter renders: a policy bound to its model, with all that was left open filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.export.lines import Line
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.parts import ModelFacts, Pattern, PolicyDocument, Serving

Predict = Callable[[str, Policy, ModelFacts], Estimate | None]
_ASSUMED_CONTEXT_TOKENS = 4096


def nobody_predicts(stack: str, policy: Policy, facts: ModelFacts) -> Estimate | None:
    """A ``Predict`` that knows nothing."""
    return None


@dataclass(frozen=True)
class Plan:
    """What an exporter renders.

    Args:
        document: where the policy comes from.
        policy: bound to the model.
        facts: the model's shape.
        model: path or name that the user gave; else the model's Hub id; "" where neither is known.
        context_tokens: of each prompt.
        sequence_tokens: prompt and answer together, never more than the model takes.
        batch: sequences at once that were asked for; None for as many as fit.
        assumed: lines on what was left open.
        predict: what a policy in a stack's own formats loses there, by the stack's name; None where
            nobody knows.
    """

    document: PolicyDocument
    policy: Policy
    facts: ModelFacts
    model: str
    context_tokens: int
    sequence_tokens: int
    batch: int | None
    assumed: tuple[Line, ...]
    predict: Predict = nobody_predicts

    @property
    def given_model(self) -> str:
        """The user's own path or name; "" where it is the Hub id that is known."""
        return "" if self.model == self.facts.hub else self.model

    @property
    def planned_context(self) -> int | None:
        """Tokens of the prompts that the plan was made for, where it says so."""
        return self.document.serving.context_tokens if self.document.serving else None

    @property
    def is_elsewhere(self) -> bool:
        """Whether prompts of another length are asked for than the plan was made for."""
        return self.planned_context not in (None, self.context_tokens)

    @property
    def room_bytes(self) -> int | None:
        """Bytes that all sequences' caches may take together; None where the plan does not say.

        What it says is what is left beside the work on prompts of its own length.
        """
        if self.document.serving is None or self.is_elsewhere:
            return None
        return self.document.serving.cache_bytes

    @property
    def planned_batch(self) -> int | None:
        """Sequences at once that the plan was made for, where it says so."""
        return self.document.serving.batch if self.document.serving else None

    @property
    def weights(self) -> str:
        """Format of the weights that the plan assumed; "" where it does not say."""
        return self.document.serving.weights if self.document.serving else ""


def plan_of(
    document: PolicyDocument,
    model: str,
    facts: ModelFacts | None,
    context_tokens: int | None,
    batch: int | None,
) -> Plan:
    """The document with all that was left open filled in, and lines on what was assumed."""
    facts = _facts(document, facts)
    if not model.isprintable():
        raise KvtuneError("the model's name holds characters that cannot be written in a file")
    policy = document.bind(facts.layers, facts.kv_heads)
    serving = document.serving or Serving()
    context, assumed = context_tokens or serving.context_tokens, []
    if context is None:
        context = _ASSUMED_CONTEXT_TOKENS
        assumed.append(Line("context", "approximated", f"not given: {context} tokens are assumed"))
    longest, lines = _longest(facts, context, serving.generated_tokens or 0)
    return Plan(
        document,
        policy,
        facts,
        model or facts.hub,
        context,
        longest,
        batch,
        (*assumed, *lines),
    )


def _facts(document: PolicyDocument, more: ModelFacts | None) -> ModelFacts:
    """What the document says of the model, and what it leaves open."""
    facts = document.model or more
    if facts is None:
        what = "a uniform policy" if isinstance(document.policy, Pattern) else "this policy"
        raise KvtuneError(
            f"{what} does not say which model it is for",
            hint="name it (--model), or add to the file "
            "model: {name: ..., layers: ..., kv_heads: ..., head_dim: ...}.",
        )
    if more is None:
        return facts
    longest = facts.max_context or more.max_context
    return replace(facts, max_context=longest, hub=facts.hub or more.hub)


def _longest(facts: ModelFacts, context: int, generated: int) -> tuple[int, list[Line]]:
    """Tokens of a sequence: prompt and answer, never more than the model takes."""
    most, wanted = facts.max_context, context + generated
    if most is None or wanted <= most:
        return wanted, []
    if context > most:
        raise KvtuneError(
            f"{facts.name} takes {most} tokens, a prompt of {context} is longer",
            hint=f"--context {most - generated if generated < most else most} leaves room for "
            "prompt and answer.",
        )
    detail = f"{most - context} tokens instead of {generated}: {facts.name} takes {most} in all"
    return most, [Line("generated tokens", "approximated", detail)]
