"""Times and memory on this machine's GPU, predicted beside measured, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtune.cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.runtime.timing import Timing
    from kvtune.tuner.timing import Predicted, Times


def times_table(times: Times) -> RenderableType:
    """The plan and the uncompressed cache in the same run."""
    from kvtune.common.units import format_tokens

    found = times.measured
    rows = [
        *_rows("", times.plan, found.plan),
        *_rows(", uncompressed", times.full_cache, found.full_cache),
    ]
    if found.alone:
        rows += _rows(f", {found.alone.batch} at once", times.alone, found.alone)
    card = times.gpu or "a GPU without a profile, of which nothing is predicted"
    return table(
        f"{found.plan.batch} x {format_tokens(found.prompt_tokens)} on {card}",
        ("", "predicted", "measured"),
        rows,
        caption=_ratios(found.ratios),
    )


def _rows(whose: str, predicted: Predicted | None, measured: Timing) -> list[tuple[str, str, str]]:
    from kvtune.common.units import format_bytes
    from kvtune.common.words import figure

    names = ("prefill", "step", "tokens_per_second")
    words = ("prefill of all", "decode step", "tokens a second")
    timed = [
        (word + whose, figure(getattr(predicted, name, None)), figure(getattr(measured, name)))
        for name, word in zip(names, words, strict=True)
    ]
    counted = [
        ("peak memory", measured.peak_bytes),
        ("cache, prompts", measured.prompt_bytes),
        ("cache, pages", measured.page_bytes),
    ]
    return timed + [(word + whose, "", format_bytes(size)) for word, size in counted]


def _ratios(ratios: dict[str, float]) -> str:
    return (
        f"plan to uncompressed: prefill {ratios['prefill']:.2f}, step {ratios['step']:.2f}, "
        f"tokens a second {ratios['tokens_per_second']:.2f}, "
        f"cache pages {ratios['page_bytes']:.2f}, peak memory {ratios['peak_bytes']:.2f}; the peak "
        f"is lower by {100 * ratios['peak_saved']:.0f} % of the cache bytes saved"
    )
