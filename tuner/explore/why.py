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
    chosen, limit = study.plans[row], study.facts.largest_kl
    tokens, most = (p.context_tokens * p.sequences for p in (plan, chosen))
    if plan.trial == chosen.trial:
        within = "holds most tokens at once of the plans within" if _within(study, plan) else (
            "loses least; none is within"
        )  # fmt: skip
        return f"It {within} {limit:g} nats a token on selection samples."
    if not _within(study, plan):
        return f"Not chosen: it loses more than the {limit:g} nats a token that are accepted."
    if tokens < most:
        return (
            f"Not chosen: it holds {count(tokens)} tokens at once, "
            f"trial {chosen.trial} {count(most)}."
        )
    return f"Not chosen: trial {chosen.trial} did better among the finalists."


def _within(study: Study, plan: Plan) -> bool:
    return plan.kl.value <= study.facts.largest_kl


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
