"""Times and memory on this machine's GPU, predicted beside measured, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvtune.cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.runtime.largest import Largest
    from kvtune.runtime.timing import Decoding, Timing
    from kvtune.tuner.expected import Expected, ExpectedLargest
    from kvtune.tuner.timing import Coverage, Most, Times

Row = tuple[str, str, str]

_UNCOMPRESSED = ", uncompressed"


def times_table(times: Times) -> RenderableType:
    """The plan and the uncompressed cache in the same run."""
    from kvtune.common.units import format_tokens

    found = times.measured
    rows = [
        *_rows("", times.plan, found.plan),
        *_rows(_UNCOMPRESSED, times.full_cache, found.full_cache),
        *(_most(times.most) if times.most else ()),
    ]
    card = times.gpu or "a GPU without a profile, of which nothing is predicted"
    return table(
        f"{found.plan.batch} x {format_tokens(found.prompt_tokens)} on {card}",
        ("", "predicted", "measured"),
        rows,
        caption="; ".join(_sentences(times)),
    )


def _rows(whose: str, predicted: Expected | None, measured: Timing) -> Iterator[Row]:
    from kvtune.common.units import format_bytes
    from kvtune.common.words import figure

    def expected(name: str) -> str:
        return figure(getattr(predicted, name, None))

    names = ("prefill", "step", "tokens_per_second")
    words = ("prefill of all", "decode step", "tokens a second")
    for name, word in zip(names, words, strict=True):
        yield word + whose, expected(name), figure(getattr(measured, name))
    seen = measured.device_bytes
    device = "unknown: no NVML" if seen is None else format_bytes(seen)
    yield f"peak memory{whose}, torch", expected("peak_bytes"), format_bytes(measured.peak_bytes)
    yield f"peak memory{whose}, NVML", expected("device_bytes"), device
    yield f"cache, prompts{whose}", "", format_bytes(measured.prompt_bytes)
    yield f"cache, pages{whose}", "", format_bytes(measured.page_bytes)


def _most(most: Most) -> Iterator[Row]:
    for name, whose in (("plan", ""), ("full_cache", _UNCOMPRESSED)):
        yield from _largest(whose, most.predicted.get(name), getattr(most, name))


def _largest(
    whose: str, predicted: ExpectedLargest | None, found: Largest[Decoding]
) -> Iterator[Row]:
    from kvtune.common.words import figure

    batch = f"{found.batch}" if found.is_exact else f"{found.batch} or more"
    rate = figure(found.found.tokens_per_second) if found.found else "-"
    guessed = (predicted.batch, predicted.tokens_per_second) if predicted else (None, None)
    yield f"largest batch{whose}", figure(guessed[0]), batch
    yield f"its tokens a second{whose}", figure(guessed[1]), rate


def _sentences(times: Times) -> Iterator[str]:
    yield _ratios(times.measured.ratios)
    if times.most and (ratios := times.most.ratios):
        yield (
            f"largest batches: {ratios['batch']:.2f} times the sequences, "
            f"{ratios['tokens_per_second']:.2f} times the tokens a second"
        )
    if times.coverage:
        yield _coverage(times.coverage)


def _ratios(ratios: dict[str, float]) -> str:
    return (
        f"plan to uncompressed: prefill {ratios['prefill']:.2f}, step {ratios['step']:.2f}, "
        f"tokens a second {ratios['tokens_per_second']:.2f}, "
        f"cache pages {ratios['page_bytes']:.2f}, peak memory {ratios['peak_bytes']:.2f}; the peak "
        f"is lower by {100 * ratios['peak_saved']:.0f} % of the cache bytes saved"
    )


def _coverage(found: Coverage) -> str:
    return f"{found.inside} of {found.of} measured figures lie inside their predicted intervals"
