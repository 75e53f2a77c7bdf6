"""Lists in options: several cards, contexts and batches, and a price for each card."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kvtune.common.errors import KvtuneError, check_alone

if TYPE_CHECKING:
    from kvtune.tuner.cases import Card

_DEAREST = 1e6  # an hour of a card
T = TypeVar("T")


def read_several(text: str, option: str, read: Callable[[str], T]) -> list[T]:
    """``8k,32k`` as a list, each read by ``read``; the same thing twice is one.

    Raises:
        KvtuneError: one is empty, or is refused by ``read``.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise KvtuneError(
            f"{option} {text} lists something empty", hint="separate what is listed by one comma."
        )
    return list(dict.fromkeys(read(word) for word in words))


def read_batch(text: str) -> int:
    """A number of sequences.

    Raises:
        KvtuneError: it is none.
    """
    from kvtune.cli.options import MOST_SEQUENCES

    if not (text.isascii() and text.isdigit() and len(text) < 9) or not (
        1 <= int(text) <= MOST_SEQUENCES
    ):
        raise KvtuneError(
            f"--batch {text} is no number of sequences from 1 to {MOST_SEQUENCES}",
            hint="write for example --batch 1,8,32; kvtune estimate --help lists what it takes.",
        )
    return int(text)


def read_cards(
    gpu: str | None,
    figures: tuple[str | None, str | None, str | None],
    mem: int | None,
    prices: str | None,
) -> list[Card]:
    """The cards that are named, those of ``any``, or this machine's; each with its price.

    Args:
        gpu: names.
        figures: memory, bandwidth and rate that are given in place of a card's own.
        mem: bytes that may be used.
        prices: per hour.

    Raises:
        KvtuneError: one is unknown, ``any`` is not alone, or there are neither one price nor as
            many as cards.
    """
    from kvtune.cli.described_card import read_card
    from kvtune.profiles.gpus import list_gpus
    from kvtune.tuner.target import read_gpu

    if gpu is not None:
        check_alone(gpu, "--gpu", ("any",))
    if any(figures):
        gpus = [read_card(gpu, *figures)]
    elif gpu is not None and gpu.lower() == "any":
        gpus = list(list_gpus())
    else:
        gpus = [read_gpu(None)] if gpu is None else read_several(gpu, "--gpu", read_gpu)
    each = _prices(prices, len(gpus))
    several = len(gpus) > 1
    limits = [g.visible_bytes if mem is None else min(mem, g.visible_bytes) for g in gpus]
    if mem is not None and not several:
        limits = [mem]  # more than the card has is told, not cut
    from kvtune.tuner.cases import Card  # takes a while to import, and a mistake needs none of it

    return [Card(*found) for found in zip(gpus, limits, each, strict=True)]


def _prices(text: str | None, cards: int) -> list[float | None]:
    if text is None:
        return [None] * cards
    prices: list[float | None] = [_price(word) for word in text.split(",")]
    if len(prices) not in (1, cards):
        raise KvtuneError(
            f"--price-per-hour gives {len(prices)} prices for {cards} card{'s' * (cards != 1)}",
            hint="give one for all of them, or one for each in the order of --gpu.",
        )
    return prices * (cards if len(prices) == 1 else 1)


def _price(word: str) -> float:
    try:
        price = float(word)
    except ValueError:
        price = -1.0
    if not 0 < price < _DEAREST:
        raise KvtuneError(
            f"--price-per-hour {word} is no price", hint="write for example 0.35, or 0.35,2.50."
        )
    return price
