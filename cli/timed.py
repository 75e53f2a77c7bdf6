"""Times and memory on this machine's GPU, predicted beside measured, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from kvtune.cli.output import table
from kvtune.common.units import format_bytes, format_tokens
from kvtune.common.words import figure

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.runtime.largest import Largest
    from kvtune.runtime.timing import Decoding, Timing
    from kvtune.tuner.expected import Expected, ExpectedLargest
    from kvtune.tuner.timing import Coverage, Promise, Times

Row = tuple[str, str, str]


def times_table(times: Times) -> RenderableType:
    """The plan, then the uncompressed cache in the same run: predicted beside measured."""
    found = times.measured
    card = times.gpu or "a GPU without a profile, of which nothing is predicted"
    return table(
        f"{found.plan.batch} x {format_tokens(found.prompt_tokens)} on {card}",
        ("", "predicted", "measured"),
        [*_half(times, "plan", "the plan"), *_half(times, "full_cache", "uncompressed")],
        caption="\n".join(_sentences(times)),
    )


def _half(times: Times, name: Literal["plan", "full_cache"], title: str) -> Iterator[Row]:
    """All rows of one of the two, below its title."""
    yield title, "", ""
    yield from _rows(getattr(times, name), getattr(times.measured, name))
    if most := times.most:
        yield from _largest(most.predicted.get(name), getattr(most, name))


def _rows(predicted: Expected | None, measured: Timing) -> Iterator[Row]:
    def expected(name: str) -> str:
        return figure(getattr(predicted, name, None))

    names = ("prefill", "step", "tokens_per_second")
    words = ("prefill of all", "decode step", "tokens a second")
    for name, word in zip(names, words, strict=True):
        yield f"  {word}", expected(name), figure(getattr(measured, name), tier=False)
    seen = measured.device_bytes
    device = "unknown: no NVML" if seen is None else format_bytes(seen)
    yield "  peak memory, torch", expected("peak_bytes"), format_bytes(measured.peak_bytes)
    yield "  peak memory, NVML", expected("device_bytes"), device
    yield "  cache, prompts", "", format_bytes(measured.prompt_bytes)
    yield "  cache, pages", "", format_bytes(measured.page_bytes)


def _largest(predicted: ExpectedLargest | None, found: Largest[Decoding]) -> Iterator[Row]:
    batch = f"{found.batch}" if found.is_exact else f"{found.batch} or more"
    rate = figure(found.found.tokens_per_second, tier=False) if found.found else "-"
    guessed = (predicted.batch, predicted.tokens_per_second) if predicted else (None, None)
    yield "  largest batch", figure(guessed[0]), batch
    yield "  its tokens a second", figure(guessed[1]), rate


def _sentences(times: Times) -> Iterator[str]:
    if times.within:
        yield _promise(times.within)
    yield _ratios(times.measured.ratios)
    if times.most and (ratios := times.most.ratios):
        yield (
            f"largest batches: {ratios['batch']:.2f} times the sequences, "
            f"{ratios['tokens_per_second']:.2f} times the tokens a second"
        )
    if times.coverage:
        yield _coverage(times.coverage)


def _promise(found: Promise) -> str:
    """Whether all that was printed ran within its limit."""
    run = found.run
    what = f"{run.batch} x {format_tokens(run.prompt_tokens)} and {run.new_tokens} new ones each"
    limit, device = format_bytes(run.limit_bytes), run.device_bytes
    ended = "ran to the end" if run.finished else "ran out of memory"
    nvml = "" if device is None else f", NVML {format_bytes(device)}"
    return (
        f"{what} {ended} within {limit}: peak {figure(found.printed)} printed, "
        f"{format_bytes(run.process_bytes)} taken (tensors {format_bytes(run.peak_bytes)}{nvml})"
    )


def _ratios(ratios: dict[str, float]) -> str:
    return (
        f"plan to uncompressed: prefill {ratios['prefill']:.2f}, step {ratios['step']:.2f}, "
        f"tokens a second {ratios['tokens_per_second']:.2f}, "
        f"cache pages {ratios['page_bytes']:.2f}, peak memory {ratios['peak_bytes']:.2f}; the peak "
        f"is lower by {100 * ratios['peak_saved']:.0f} % of the cache bytes saved"
    )


def _coverage(found: Coverage) -> str:
    return f"{found.inside} of {found.of} measured figures lie inside their predicted intervals"
