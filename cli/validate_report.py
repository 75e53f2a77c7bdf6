"""What ``kvtune validate`` says: the loss before this run beside what the run measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.common.estimate import Estimate
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.tuner.validate import Validation


@dataclass(frozen=True)
class Known:
    """What is known of a policy's loss before this run, nats/token.

    Args:
        predicted: without running the model, or None.
        earlier: of an earlier live run, or None.
    """

    predicted: Estimate | None
    earlier: Estimate | None


def known_before(document: PolicyDocument, path: Path, stack: str) -> Known:
    """The file's own figure; where that is a live run's, the prediction in the search's result.

    None of either where the file's is of another way to run it.
    """
    quality = document.provenance.quality if document.provenance else None
    loss = quality.kl_nats_per_token if quality else None
    if quality is None or loss is None or quality.stack != stack:
        return Known(None, None)
    if loss.tier != "live":
        return Known(loss, None)
    return Known(_predicted_by_search(path.parent / "result.json", loss), loss)


def _predicted_by_search(path: Path, live: Estimate) -> Estimate | None:
    """The prediction of the search that measured ``live``; None where no such result is there."""
    from kvtune.common.errors import KvtuneError
    from kvtune.tuner.stored_result import read_result

    try:
        found = read_result(path)
    except KvtuneError:
        return None
    by_policy = {each.live: each.predicted for each in found.baselines}
    return (by_policy | {found.quality.kl: found.predicted_quality.kl}).get(live)


def other_texts(path: Path, found: Validation) -> str | None:
    """A warning where the run read other kinds of text than the search, with what it cost.

    None where they are the same, or where the search's result is not beside the policy.
    """
    from kvtune.common.errors import KvtuneError
    from kvtune.tuner.stored_result import read_result

    try:
        searched = set(read_result(path).baselines[0].by_kind)
    except KvtuneError:
        return None
    new = set(found.by_kind) - searched
    if not searched or not new:
        return None
    words = f"searched on {', '.join(sorted(searched))} and run here on {', '.join(sorted(new))}"
    return f"the plan was {words} too; {_cost_of(found, searched, new)}"


def _cost_of(found: Validation, searched: set[str], new: set[str]) -> str:
    """How much more the plan loses on text that the search did not read."""
    from statistics import mean

    losses = {kind: loss.value for kind, loss in found.by_kind.items()}
    there = mean(losses[kind] for kind in new)
    known = [losses[kind] for kind in searched & set(losses)]
    if not known or mean(known) <= 0:
        return f"it loses {there:.2g} nats a token there; one with them (--text) may do better"
    return (
        f"it loses {there / mean(known):.2g} times as much on those as on what it was searched on"
    )


def report(
    known: Known, policy: Policy, found: Validation, planned: int, stack: str
) -> RenderableType:
    """The loss by kind of text, bytes and answers, predicted beside measured."""
    from kvtune.common.units import format_bytes
    from kvtune.common.words import accuracy, count, figure

    change = found.perplexity_change
    rows = [
        ("KL nats/token", figure(known.predicted), figure(found.live)),
        *([("KL, an earlier run", "", figure(known.earlier))] if known.earlier else []),
        *((f"KL, {kind}", "", figure(loss)) for kind, loss in found.by_kind.items()),
        ("bytes of one prompt", format_bytes(planned), format_bytes(found.prompt_bytes)),
        ("perplexity", "", "-" if change is None else f"{100 * change.value:+.2g} %"),
        ("retrieval", "", accuracy(found.retrieval_accuracy)),
        ("retrieval, full cache", "", accuracy(found.full_cache_accuracy)),
        *(
            (
                f"answers right, {kind}",
                "",
                f"{100 * right.ours:.0f} %, full cache {100 * right.full:.0f} %",
            )
            for kind, right in found.right_by_kind.items()
        ),
        *((what.replace("_", " "), "", count(n)) for what, n in found.counters.items()),
    ]
    return table(
        f"{policy.name}, live" + (f" as {stack} stores prompts and answers" if stack else ""),
        ("", "predicted", "measured"),
        rows,
        caption=f"quality: own model, live, {found.samples} held-out samples, 95 % intervals",
    )


def answer(
    document: PolicyDocument, known: Known, found: Validation, planned: int, stack: str
) -> dict[str, Any]:
    """The same for ``--json``."""
    from kvtune.policies.policy_file.document import as_plain

    return {
        "policy": as_plain(document),
        "quality": {
            "kl_nats_per_token": found.live.value,
            "interval": [found.live.low, found.live.high],
            "tier": found.live.tier,
            "source": "own trace",
            "stand_in": None,
            "samples": found.samples,
            "stack": stack or None,
        },
        "predicted": known.predicted,
        "earlier_live": known.earlier,
        "by_kind": found.by_kind,
        "perplexity_change": found.perplexity_change,
        "retrieval_accuracy": found.retrieval_accuracy,
        "full_cache_accuracy": found.full_cache_accuracy,
        "right_by_kind": {kind: vars(right) for kind, right in found.right_by_kind.items()},
        "prompt_bytes": planned,
        "counted_bytes": found.prompt_bytes,
        "counters": found.counters,
        "rounding_kl_nats_per_token": found.rounding,
    }
