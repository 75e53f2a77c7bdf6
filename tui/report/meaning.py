"""What the figures of a report mean, in the report itself: it has to do without a network."""

from __future__ import annotations

from kvtune.tuner.explore.study import Study

ANCHOR = "figures"


def meaning(study: Study) -> dict[str, object]:
    """Terms of the page, each with a sentence or two."""
    facts = study.facts
    chosen_on, others = facts.selection_samples, facts.held_out_samples
    terms: dict[str, object] = {
        "KL, nats/token": "How far the next-token distribution with the compressed cache is from "
        "the full cache's. 0 is the same; at 0.01 sampled text is hard to tell apart; at 1 the "
        "model says something else.",
        "selection, held out": f"Plans were chosen on {chosen_on} samples of text; the held-out "
        f"loss is that of {others} others, on which nothing was chosen.",
        "tiers of a loss": "table: predicted from recorded probes; replay: the whole plan applied "
        "to the recorded samples; live: the model ran with the plan. Believe live.",
        "tiers of memory and time": "exact is counted and measured was timed on such a card; "
        "interpolated, fitted, transferred come from measurements, datasheet and assumed do not.",
        "[low, high]": "An interval: 95 % over samples for a loss, 10-90 % for memory and time.",
        "retrieval": "Digits hidden in a long prompt and asked for after it was compressed: the "
        "share that the model still gives. A small mean loss can hide that one fact was dropped.",
        "% of bf16": "Bytes of a prompt's cache, scales and lengths included, of those in 16 bits.",
    }
    if facts.stand_in:
        terms["stand-in"] = (
            f"The weights of {facts.shape.name} were not at hand: losses are {facts.stand_in}'s, "
            "as bands. They say which kind of policy to try, not what this model will lose."
        )
    terms["more"] = "docs/concepts.md of kvtune: how it works, and when not to trust it."
    return terms
