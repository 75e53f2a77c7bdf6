"""How scores of heads are shown, and what each of them means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtune.cli.output import table

if TYPE_CHECKING:
    from kvtune.policies.head_scores import HeadScores

SCORES = (
    ("echo", "detected", "attention to earlier places of the same token (RazorAttention)"),
    ("induction", "detected", "attention to what followed those (RazorAttention)"),
    ("retrieval", "detected", "looks most at the very token that is copied (Wu et al.)"),
    ("semantic", "detected", "mass on the whole needle that is answered from (CompressKV)"),
    ("sink", "detected", "mass on the first token; a head with all of it there is dormant"),
    ("duo", "learned", "gates of DuoAttention, from its .tsv or by detect --by duo"),
    ("rlkv", "learned", "gates of RLKV, from its .tsv or by detect --by rlkv"),
)


def score_table(heads: HeadScores) -> Any:
    """Mean and highest of each score, and how many heads have much of it."""
    import numpy as np

    rows = []
    for name, score in sorted(heads.scores.items()):
        layer, head = np.unravel_index(int(score.argmax()), score.shape)
        rows.append(
            (
                name,
                f"{score.shape[0]} x {score.shape[1]} {heads.about[name].heads}",
                f"{score.mean():.3f}",
                f"{score.max():.3f} (layer {layer}, head {head})",
                f"{100 * (score > 0.1).mean():.1f} %",
            )
        )
    columns = ("score", "of", "mean", "highest", "above 0.1")
    return table(f"Heads of {heads.model}", columns, rows, left=(0, 1))


def overlap_table(pairs: list[tuple[str, str, float]]) -> Any:
    """How many of the highest heads two scores have in common."""
    rows = [(one, other, f"{100 * share:.0f} %") for one, other, share in pairs]
    return table("Of the top tenth of KV heads, in common", ("score", "and", "shared"), rows)


def as_plain(heads: HeadScores) -> dict[str, Any]:
    """The form that goes into JSON."""
    return {
        "model": heads.model,
        "scores": {
            name: {"about": heads.about[name], "values": score.tolist()}
            for name, score in sorted(heads.scores.items())
        },
    }
