"""The plan under the cursor, and its figures in words, for screens and report alike."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.common.units import format_bytes
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.simulator.memory.at_once import prompts_at_once
from kvtune.tuner.explore.dimensions import in_words
from kvtune.tuner.explore.plans import Plan
from kvtune.tuner.explore.study import Study
from kvtune.tuner.explore.view import View


@dataclass(frozen=True)
class Selected:
    """The plan under the cursor, in its view."""

    view: View
    row: int

    @property
    def study(self) -> Study:
        """The study that the plan is of."""
        return self.view.study

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.study.plans[self.row]


def title(selected: Selected) -> str:
    """Which plan it is."""
    words = f"Plan of trial {selected.plan.trial}"
    if selected.row == selected.study.chosen:
        words += " ★ " + ("chosen" if selected.study.outcome else "best so far")
    return f"{words}, what if" if selected.view.is_what_if else words


def quality_rows(selected: Selected) -> list[tuple[str, str]]:
    """What it is, and what it loses: on selection samples, on held-out ones, and live."""
    study, plan = selected.study, selected.plan
    rows = [
        ("policy", in_words(study, selected.row)),
        ("loss, selection", figure(plan.kl)),
        ("loss, held out", figure(plan.held_out)),
    ]
    if (live := study.live(plan)) is not None:
        rows.append(("loss, live", figure(live.kl)))
        if live.perplexity_change is not None:
            rows.append(("perplexity", f"{100 * live.perplexity_change.value:+.2g} % live"))
        if live.retrieval_accuracy is not None:
            full = accuracy(live.full_cache_accuracy)
            rows.append(
                ("retrieval", f"{accuracy(live.retrieval_accuracy)} live, full cache {full}")
            )
    return [*rows, ("quality", study.facts.quality)]


def cost_rows(selected: Selected) -> list[tuple[str, str]]:
    """What it takes at the setting of the view."""
    figures, row, layout = selected.view.figures, selected.row, selected.study.facts.layout
    size, share = int(figures.prompt_bytes[row]), float(figures.share[row])
    at_once = f"{count(figures.sequences[row])} x {count(figures.context_tokens[row])} tokens"
    return [
        *([("counted", layout)] if layout else []),
        ("one prompt", f"{format_bytes(size)}, {percent(share)} of bf16"),
        ("prompts at once", at_once),
        ("room for", f"{_room(selected)} prompts, {count(figures.tokens_that_fit[row])} tokens"),
        ("time per token", figure(figures.estimate("step_s", row))),
        ("tokens/s", figure(figures.estimate("tokens_per_s", row))),
    ]


def _room(selected: Selected) -> str:
    """How many prompts fit at once: ``17 [14, 18]``."""
    figures, row = selected.view.figures, selected.row
    counted = int(figures.tokens_that_fit[row] // figures.context_tokens[row])
    return figure(prompts_at_once(counted, figures.most(row)), tier=False)
