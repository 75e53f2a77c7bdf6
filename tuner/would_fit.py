"""How a combination that does not fit could: fewer, shorter, compressed, narrower, larger."""

from __future__ import annotations

import math
from bisect import bisect_left

from kvtune.common.errors import KvtuneError
from kvtune.simulator.memory.weights import WeightFormat
from kvtune.tuner.cases import FULL, Card, Case
from kvtune.tuner.estimating import Asked

_STEP = 256  # tokens between the contexts that are tried


def what_would_fit(asked: Asked, case: Case) -> list[str]:
    """Each way by itself: fewer, shorter, compressed, narrower weights, a larger card."""
    at_most = case.cost.sequences_that_fit if case.cost else 0
    found = [f"--batch {at_most}"] if at_most else []
    if context := _longest_context(asked, case):
        found.append(f"--context {context}")
    if case.budget and case.policy == FULL and case.budget.cache_bytes:
        share = two_digits_below(100 * case.budget.share_that_fits)
        found.append(f"a cache compressed to {share} % of bf16 (kvtune search)")
    if weights := narrower_weights(asked, case):
        found.append(f"--weights {weights}")
    if larger := _smallest_card(asked, case):
        found.append(f"--gpu {larger}")
    return found


def narrower_weights(asked: Asked, case: Case) -> WeightFormat | None:
    """The widest format of weights, narrower than the case's, with which all of it fits."""
    from kvtune.simulator.memory.weights import formats_by_width, weight_bytes

    now = weight_bytes(asked.shape, case.weight_format(asked.shape)).value
    for weights in formats_by_width(asked.shape, case.card.gpu):
        narrower = weight_bytes(asked.shape, weights).value < now
        if narrower and _fits(asked, case.card, case, case.context_tokens, weights):
            return weights
    return None


def _fits(asked: Asked, card: Card, case: Case, context: int, weights: str | None = None) -> bool:
    try:
        cases = asked.of(card, context, case.batch, case.split, weights or case.weights)
    except KvtuneError:
        return False
    return next(found.fits for found in cases if found.policy == case.policy)


def _longest_context(asked: Asked, case: Case) -> int | None:
    """The longest prompts that fit in the same batch, in steps of 256 tokens."""
    steps = range(_STEP, case.context_tokens, _STEP)
    fitting = bisect_left(
        steps, True, key=lambda context: not _fits(asked, case.card, case, context)
    )
    return steps[fitting - 1] if fitting else None


def _smallest_card(asked: Asked, case: Case) -> str | None:
    """The known card with the least memory on which all of it fits."""
    from kvtune.profiles.gpus import list_gpus

    larger = [gpu for gpu in list_gpus() if gpu.visible_bytes > case.card.memory_bytes]
    for gpu in sorted(larger, key=lambda gpu: gpu.visible_bytes):
        if _fits(asked, Card(gpu, gpu.visible_bytes, None), case, case.context_tokens):
            return gpu.slug
    return None


def two_digits_below(percent: float) -> str:
    """A share that still fits when it is typed: rounded down to two digits, above zero."""
    step = 10.0 ** (math.floor(math.log10(percent)) - 1)
    return f"{math.floor(percent / step) * step:.2g}"
