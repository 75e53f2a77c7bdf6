"""Why a plan was chosen, or was not, in sentences."""

from __future__ import annotations

from collections import Counter

from kvtune.common.words import count
from kvtune.tuner.explore.plans import Plan
from kvtune.tuner.explore.study import Study


def why(study: Study, plan: Plan) -> list[str]:
    """Reasons first, then what the study chose and what the heads came to."""
    return [_verdict(study, plan), *_notes(study, plan), _choices(plan), _heads(study, plan)]


def _verdict(study: Study, plan: Plan) -> str:
    row = study.chosen
    if row is None:
        return "no plan yet."
    chosen = study.plans[row]
    if plan.trial == chosen.trial:
        return _why_chosen(study, plan)
    return f"Not chosen: {_why_not(study, plan, chosen)}."


def _why_chosen(study: Study, plan: Plan) -> str:
    limit = study.facts.largest_kl
    reason = (
        "holds most tokens at once of the plans within"
        if study.believed(plan) <= limit
        else "loses least; none is within"
    )
    later = "" if study.outcome else " The search's end leaves out luck, and may pick another."
    return f"It {reason} {limit:g} nats a token on selection samples.{later}"


def _why_not(study: Study, plan: Plan, chosen: Plan) -> str:
    """The search's rule, step by step: the limit, the widest weights, the most tokens at once."""
    limit, name = study.facts.largest_kl, f"trial {chosen.trial}"
    if study.believed(plan) > limit:
        return f"it loses more than the {limit:g} nats a token that are accepted"
    if study.believed(chosen) > limit:
        return f"on samples that a choice did not see, none stays within {limit:g} nats a token"
    tokens, most = (each.context_tokens * each.sequences for each in (plan, chosen))
    bytes_wide, wanted = (study.weight_bytes_of(each) for each in (plan, chosen))
    if bytes_wide < wanted:
        return f"{name} does what is asked with wider weights"
    if (bytes_wide, tokens) > (wanted, most):
        return (
            "on samples that the choice did not see, the best of the plans that serve as much "
            f"loses more than {limit:g} nats a token"
        )
    if tokens < most:
        return f"it holds {count(tokens)} tokens at once, {name} {count(most)}"
    return f"{name} did better among the finalists"


def _notes(study: Study, plan: Plan) -> list[str]:
    """The search's own reasons, for the plan that they are about."""
    if study.outcome is None or not study.is_chosen(plan):
        return []
    return [f"{note[0].upper()}{note[1:]}" for note in study.outcome.notes]


def _choices(plan: Plan) -> str:
    """What the outer study chose."""
    asked = plan.parameters
    on = [name for name, value in asked.items() if value is True]
    off = [name for name, value in asked.items() if value is False]
    parts = [f"with {', '.join(on)}" if on else "", f"without {', '.join(off)}" if off else ""]
    parts += [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in asked.items()
              if not isinstance(v, bool)]  # fmt: skip
    return "Study: " + ", ".join(part for part in parts if part) + "."


def _heads(study: Study, plan: Plan) -> str:
    """The options that most heads take."""
    taken = Counter(plan.heads.tolist()).most_common(3)
    words = [f"{number} {study.facts.options[option].label}" for option, number in taken]
    return f"Heads: {', '.join(words)}, of {len(plan.heads)}."
