"""The largest batch that fits on this GPU: guessed, tried, and closed in on from both sides.

The caches are filled as in service, where prompts come one after another: one prompt is read, and
what each layer keeps of it is stored for every sequence before the next layer is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from kvtune.common.transformers_interface import attention_restored
from kvtune.policies.page_formats import PAGE
from kvtune.policies.paging import Growth, sequence_bytes
from kvtune.policies.policy import Policy
from kvtune.runtime.admission import read_for_all
from kvtune.runtime.cache.loading import load_cache
from kvtune.runtime.device import Bench, unless_full
from kvtune.runtime.timing import Decoding, time_decoding

Found = TypeVar("Found")

NEW_TOKENS = PAGE
"""What every sequence generates in a try."""
STEPS, STRETCHES = 8, 6


@dataclass(frozen=True)
class Bounds:
    """When to stop looking.

    Args:
        tries: at most.
        seconds: no try is begun that would end later, if it took as long as the longest.
        clock: tells them.
    """

    tries: int = 10
    seconds: float = 90.0
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Largest(Generic[Found]):
    """What a search has found.

    Args:
        batch: the largest that fitted; 0 if none did.
        too_large: the smallest that did not; None if all fitted.
        tries: that were made.
        found: by the try at ``batch``; None if there was none.
    """

    batch: int
    too_large: int | None
    tries: int
    found: Found | None

    @property
    def is_exact(self) -> bool:
        """Whether one sequence more was tried and did not fit."""
        return self.too_large == self.batch + 1


def search_largest(
    attempt: Callable[[int], Found], guess: int, bounds: Bounds | None = None
) -> Largest[Found]:
    """The largest batch that a call can do in the device's memory.

    Args:
        attempt: does it for a batch; runs out of memory as torch does. What it leaves in use
            counts against the next.
        guess: tried first; then further and further from it until one fits and one does not.
        bounds: when to stop.
    """
    bounds = bounds or Bounds()
    begun = now = bounds.clock()
    batch, too_large, found = 0, None, None
    longest, tries, reach, asked = 0.0, 0, max(1, guess // 16), max(1, guess)
    while tries < bounds.tries and now + longest <= begun + bounds.seconds:
        result = unless_full(lambda asked=asked: attempt(asked))  # type: ignore[misc]
        batch, found = (batch, found) if result is None else (asked, result)
        too_large = asked if result is None else too_large
        tries, longest, now = tries + 1, max(longest, bounds.clock() - now), bounds.clock()
        if too_large == batch + 1:
            break
        asked, reach = _next(batch, too_large, reach), 2 * reach
    return Largest(batch, too_large, tries, found)


def _next(fits: int, too_large: int | None, reach: int) -> int:
    """Up or down from the guess, further every time; half way once it is between two."""
    if too_large is None:
        return fits + reach
    return (fits + too_large) // 2 if fits else max(1, too_large - reach)


def find_largest(
    policy: Policy,
    model: Any,
    prompt: Tensor,
    bench: Bench,
    guess: int | None = None,
    bounds: Bounds | None = None,
) -> Largest[Decoding]:
    """Decode the largest batch of a prompt that fits, and see how fast it goes.

    Args:
        policy: for the model's shape; one that ``time_beside`` would take.
        model: a transformers causal language model; as it was when this returns.
        prompt: ``[1, P]`` token ids on the model's device.
        bench: of that device.
        guess: None for what the free memory would hold of pages alone.
        bounds: when to stop.
    """
    bench.release()
    each = sequence_bytes(policy, prompt.shape[1], _head_dim(model), Growth(NEW_TOKENS))
    most = bench.available_bytes() // each
    try:
        with attention_restored(model):
            return search_largest(
                lambda batch: time_filled(policy, model, prompt, batch, bench),
                most if guess is None else min(guess, most),
                bounds,
            )
    finally:
        bench.release()


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config()
    known: int | None = getattr(config, "head_dim", None)
    return known or config.hidden_size // config.num_attention_heads


def time_filled(policy: Policy, model: Any, prompt: Tensor, batch: int, bench: Bench) -> Decoding:
    """Decode from a batch of one prompt; raises what ``load_cache`` does, or out of memory."""
    bench.release()
    cache = load_cache(policy, model, new_tokens=NEW_TOKENS)
    first = read_for_all(model, cache, prompt, batch).argmax(-1).expand(batch)
    return time_decoding(model, cache, first, prompt.shape[1], bench, STEPS, STRETCHES)
