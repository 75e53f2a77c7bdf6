"""What ``kvtune search`` prints: the verdict, the tables behind it, files and the next step."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtune.cli.front_report import formats_found, front_table, weights_table
from kvtune.cli.inputs import POLICY_FILE
from kvtune.cli.output import one_line, table
from kvtune.cli.tables import bf16_tokens, budget_table
from kvtune.cli.timed import times_table
from kvtune.cli.wording import BRACKETS, LABELS
from kvtune.common.estimate import BAND
from kvtune.common.units import MIB, format_bytes, format_tokens
from kvtune.common.words import accuracy, count, figure, percent
from kvtune.simulator.cost import one_after_the_other
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.result import Baseline, Quality, SearchResult
from kvtune.tuner.serving_room import budgets_of, formats_of
from kvtune.tuner.stand_in_baselines import LIVE_ON
from kvtune.tuner.verdict import SCALE, Verdict, equal_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.common.estimate import Estimate
    from kvtune.tuner.which_gpu import Tried


def first_words(request: SearchRequest) -> str:
    """What is left for the cache, which is known before the long work.

    Raises:
        KvtuneError: the model does not fit, or the limit is beyond the card.
    """
    budgets = budgets_of(request)
    several = len(formats_of(budgets)) > 1
    each = [
        f"{format_bytes(budget.cache.value)} of {format_bytes(budget.limit_bytes)} are left for "
        f"the cache, {bf16_tokens(budget.cache_tokens)}"
        + (f", with {weights} weights" if several else "")
        for (weights, context), budget in budgets.items()
        if context == request.contexts[-1]
    ]
    return "\n".join(each)


def tables(result: SearchResult) -> list[RenderableType]:
    """Everything after the search, in the order it is read."""
    found = verdict(result)
    return [
        found.sentence + _said_of_stack(result),
        SCALE,
        *("", _baselines(result, found.comparison)),
        *(["", weights_table(result, _caption(result))] if len(formats_found(result)) > 1 else []),
        *("", front_table(result, _caption(result))),
        *("", _plan(result)),
        *("", budget_table(result.budget, quality_words(result.quality))),
        *(["", times_table(result.times)] if result.times else []),
        *([f"times: {result.untimed}"] if result.untimed else []),
        *(["", *(f"note: {note}" for note in result.notes)] if result.notes else []),
        *("", *_files(result)),
    ]


def tried_table(tried: Sequence[Tried]) -> RenderableType:
    """The cards that were searched for, least memory first; the last one is the answer."""
    rows = [
        ("*" if each.works else "", each.gpu, format_bytes(each.memory_bytes), each.reason)
        for each in tried
    ]
    caption = "* is the smallest card that does what was asked; its plan follows"
    columns = ("", "card", "memory", "plan, or why there is none")
    return table("Which GPU", columns, rows, left=(0, 1, 3), caption=caption)


def verdict(result: SearchResult) -> Verdict:
    """What the search comes to."""
    return Verdict(
        sequences=result.sequences,
        full_cache_sequences=result.full_cache_sequences,
        context_tokens=result.context_tokens,
        memory_bytes=result.request.memory_bytes,
        kl=result.quality.kl,
        stand_in=result.quality.stand_in,
        stack=result.quality.stack,
        policies=result.baselines,
        retrieval=result.plan.retrieval_accuracy,
        full_cache_accuracy=result.full_cache_accuracy,
        largest_kl=result.request.largest_kl,
        weights=result.budget.weight_format,
        step=result.latency,
    )


def quality_words(quality: Quality) -> str:
    """``stand-in (smollm2-135m)`` or ``own trace``."""
    return f"stand-in ({quality.stand_in})" if quality.source == "stand-in" else quality.source


def _caption(result: SearchResult) -> str:
    return f"quality: {quality_words(result.quality)}"


def _baselines(result: SearchResult, comparison: str) -> RenderableType:
    """The plan and others, with a column for each estimator: losses in one can be compared."""
    live = any(baseline.live for baseline in result.baselines)
    retrieval = any(baseline.retrieval_accuracy for baseline in result.baselines)
    tiers = sorted({baseline.predicted.tier for baseline in result.baselines}, reverse=True)
    on_host = any(baseline.host_bytes for baseline in result.baselines)
    columns = ["", "policy", "MiB", *(["on the host"] * on_host), *(["KL, live"] if live else [])]
    columns += [f"KL, {tier}" for tier in tiers]
    columns += ["perplexity"] * live + ["retrieval"] * retrieval
    full = result.full_cache_accuracy
    intervals = "with 95 % intervals [a, b]" if BAND not in tiers else "as bands"
    captions = [
        *([comparison] if comparison else []),
        *_on_rules_that_ran(result),
        f"{_caption(result)}, {result.quality.samples} held-out samples",
        f"KL in nats/token {intervals}, MiB of one prompt; * is the plan",
        *([LABELS] if any("int" in baseline.name for baseline in result.baselines) else []),
        *([f"retrieval of the full cache: {accuracy(full)}"] if full else []),
    ]
    plan, *others = result.baselines
    room = "at equal bytes" if equal_bytes(plan, others) else "in at most its bytes"
    return table(
        f"The plan beside others {room}",
        columns,
        [_baseline(baseline, tiers, live, retrieval, on_host) for baseline in result.baselines],
        left=(0, 1),
        caption="\n".join(captions),
    )


def _on_rules_that_ran(result: SearchResult) -> list[str]:
    """How to read the rows of a stand-in's rules."""
    if not any(baseline.name.endswith(LIVE_ON) for baseline in result.baselines):
        return []
    model = result.quality.stand_in
    return [f"live on {model}: what such rules lost when it ran them, read at the plan's bytes"]


def _baseline(
    baseline: Baseline, tiers: Sequence[str], live: bool, retrieval: bool, on_host: bool
) -> list[str]:
    predicted = figure(baseline.predicted, tier=False)
    change = baseline.perplexity_change
    return [
        "*" if baseline.family == "kvtune" else "",
        baseline.name,
        f"{baseline.prompt_bytes / MIB:.2f}",
        *([f"{baseline.host_bytes / MIB:.2f}"] if on_host else []),
        *([figure(baseline.live, tier=False)] if live else []),
        *(predicted if baseline.predicted.tier == tier else "-" for tier in tiers),
        *(["-" if change is None else f"{100 * change.value:+.2g} %"] if live else []),
        *([accuracy(baseline.retrieval_accuracy)] if retrieval else []),
    ]


def _plan(result: SearchResult) -> RenderableType:
    head_dim = result.request.shape.head_dim
    on_host = result.policy.host_bytes(result.context_tokens, head_dim)
    rows = [
        ("loss", f"{figure(result.quality.kl)}, nats/token"),
        *_loss_there(result),
        ("prompt", f"{format_bytes(result.prompt_bytes)}, {percent(result.share)} of bf16"),
        *([("on the host", format_bytes(on_host))] if on_host else []),
        ("prompts at once", _at_once(result)),
        ("peak memory", figure(result.memory)),
        ("time per token", figure(result.latency)),
        ("prefill of a prompt", figure(result.prefill)),
        ("compressing it", figure(result.compression)),
    ]
    if result.request.limits.first_token_s is not None:
        both = one_after_the_other(result.prefill, result.compression)
        rows.append(("first token", figure(both)))
    if result.counters:
        fired = ", ".join(f"{count(n)} {what}" for what, n in result.counters.items())
        rows.append(("fired live", fired.replace("_", " ")))
    return table("The plan", ("", ""), rows, left=(0, 1), caption=f"{_caption(result)}; {BRACKETS}")


def _there(result: SearchResult) -> tuple[str, Estimate] | None:
    """The stack that was searched for and a stand-in's loss there, where it stores answers too."""
    if result.request.stack is None or result.quality.stack:
        return None
    from kvtune.policies.export.contract import find_exporter
    from kvtune.policies.export.stored_alike import loss_there

    stack = find_exporter(result.request.stack)
    loss = loss_there(result.quality.kl, result.policy, stack.limits)
    if loss is None or loss == result.quality.kl:
        return None
    return stack.stack, loss


def _loss_there(result: SearchResult) -> list[tuple[str, str]]:
    """Of which loss is which, where a stack stores answers as it stores prompts."""
    if result.quality.stack:
        ours = result.baselines[0].best
        detail = "with prompts read whole, and answers in 16 bits; so it is beside others above"
        return [("in kvtune's runtime", f"{figure(ours)}, nats/token, {detail}")]
    if (there := _there(result)) is None:
        return []
    return [(f"in {there[0]}", f"{figure(there[1])}, nats/token; it stores answers likewise")]


def _said_of_stack(result: SearchResult) -> str:
    """Behind the verdict, where its loss is not the stack's: what that is likely to be."""
    if (there := _there(result)) is None:
        return ""
    stack, loss = there
    return f"; in {stack}, which stores answers likewise, at {loss.low:.2g} to {loss.high:.2g}"


def _at_once(result: SearchResult) -> str:
    tokens, asked = format_tokens(result.context_tokens), result.request.sequences
    ours = count(asked) if asked else figure(result.at_once, tier=False)
    said = ", as asked" if asked else ""
    return f"{ours} of {tokens}{said}; uncompressed {figure(result.full_cache_at_once)}"


def _files(result: SearchResult) -> list[RenderableType]:
    folder = result.request.run_dir
    return [
        one_line(f"policy: {folder / POLICY_FILE}"),
        "        (edit it freely; every mistake is told with its line)",
        one_line(f"result: {folder / 'result.json'}"),
        "",
        *_next(result),
    ]


def _next(result: SearchResult) -> list[RenderableType]:
    """What helps most now: real weights where a stand-in stood, else the serving stack."""
    if result.quality.source == "own trace":
        return [_serve(result, "transformers")]
    name = result.request.shape.name
    own = (
        f"quality of {name} itself: the same search with --model PATH, a folder of its weights,\n"
        "        or OWNER/NAME of the Hub, whose size is said before it is fetched"
    )
    if result.policy.waits:  # which no other stack does
        folder = result.request.run_dir
        return [own, one_line(f"next: {shlex.join(['kvtune', 'export', str(folder)])} --compare")]
    return [own, _serve(result, "vllm", "--allow-stand-in")]


def _serve(result: SearchResult, usual: str, *more: str) -> RenderableType:
    """The export to the stack that was searched for, as it can be copied, on one line however long.

    Of a plan with heads on the host, which every export refuses: what serves it.
    """
    folder = result.request.run_dir
    if any(option.on_host for option in result.policy.options()):
        call = f"kvtune.load_cache({str(folder / POLICY_FILE)!r}, model)"
        return one_line(f"next: {call} in Python serves it; no export keeps heads on the host")
    stack = result.request.stack or usual
    words = ["kvtune", "export", str(folder / POLICY_FILE), "--to", stack]
    words += ["--out", str(folder / stack), *more]
    return one_line(f"next: {shlex.join(words)}")
