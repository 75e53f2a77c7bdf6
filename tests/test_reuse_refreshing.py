"""KVShare's second stage, against whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.blending import Blended, blended
from kvtune.runtime.reuse.passes import PromptCache, part_of
from kvtune.runtime.reuse.refreshing import Refreshing
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = tuple(2 + (7 * n * n + 3 * n) % 250 for n in range(40))
FIRST, WHOLE = 12, 30  # tokens of the first chunk, and of all


def whole_pass(model: Any, ids: tuple[int, ...]) -> PromptCache:
    with torch.no_grad():
        return prompt_cache(model, ids)


def joined_apart(model: Any, share: float) -> Blended:
    parts = [whole_pass(model, part) for part in (IDS[:FIRST], IDS[FIRST:20], IDS[20:WHOLE])]
    return blended(model, IDS[:WHOLE], parts, share=share, rule="kvshare")


def distance(ours: PromptCache, theirs: PromptCache) -> float:
    """Largest difference of keys and values, over all layers."""
    return max(
        float((x - y).abs().max())
        for pair, other in zip(ours, theirs, strict=True)
        for x, y in zip(pair, other, strict=True)
    )


def test_behind_an_exact_beginning_what_was_refreshed_is_exact(tiny_model: Any) -> None:
    found = joined_apart(tiny_model, 0.0)
    assert found.stale.tolist() == list(range(FIRST, WHOLE))
    answering = Refreshing(tiny_model, found, IDS[:WHOLE], new_tokens=6)
    exact = whole_pass(tiny_model, IDS[:WHOLE])
    before = distance(found.cache, exact)
    for step, token in enumerate(IDS[WHOLE : WHOLE + 6]):
        answering.logits(token)
        done = FIRST + 3 * (step + 1)
        assert answering.waiting == list(range(done, WHOLE))
        assert (
            distance(part_of(answering.cache, slice(0, done)), part_of(exact, slice(0, done)))
            < 1e-4
        )
    assert before > 1e-2, "chunks read apart differ from a whole pass, or nothing is shown here"


@pytest.mark.parametrize("a_step", [0, 3])
def test_a_step_answers_from_the_cache_that_it_leaves(tiny_model: Any, a_step: int) -> None:
    found = joined_apart(tiny_model, 0.2)
    assert not {*found.stale.tolist()} & {*found.recomputed.tolist()}
    answering = Refreshing(tiny_model, found, IDS[:WHOLE], new_tokens=4, a_step=a_step)
    for place, token in enumerate(IDS[WHOLE : WHOLE + 4], WHOLE):
        ours = answering.logits(token)
        with torch.no_grad():
            seen = full_cache_handler(part_of(answering.cache, slice(0, place)))
            theirs = run_observed(tiny_model, [token], place, seen)[0][0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert len(answering.waiting) == max(len(found.stale) - 4 * a_step, 0)


def test_the_blended_cache_stays_as_it_was(tiny_model: Any) -> None:
    found = joined_apart(tiny_model, 0.2)
    kept = [(k.clone(), v.clone()) for k, v in found.cache]
    Refreshing(tiny_model, found, IDS[:WHOLE], new_tokens=2).logits(IDS[WHOLE])
    assert distance(found.cache, kept) == 0


def test_tokens_that_do_not_fit_are_refused(tiny_model: Any) -> None:
    found = joined_apart(tiny_model, 0.2)
    with pytest.raises(KvtuneError, match="29 tokens, but a cache of 30"):
        Refreshing(tiny_model, found, IDS[: WHOLE - 1], new_tokens=2)
    answering = Refreshing(tiny_model, found, IDS[:WHOLE], new_tokens=1)
    answering.logits(IDS[WHOLE])
    with pytest.raises(KvtuneError, match="longer than was asked for"):
        answering.logits(IDS[WHOLE + 1])
