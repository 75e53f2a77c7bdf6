"""PIE: a cached prompt is edited by encoding what is new and turning the keys behind it.

After He et al., "Let the Code LLM Edit Itself When You Edit the Code", ICLR 2025, arXiv 2407.03157
(no code was released). Positions are put right; what the suffix says of the old text is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.passes import (
    PromptCache,
    joined,
    moved,
    part_of,
    refuse_windows,
    run_anew,
    tokens_of,
    with_room,
)
from kvtune.traces.models import LoadedModel


@dataclass(frozen=True)
class Edit:
    """Tokens ``start`` to ``stop`` of the prompt become others; either may be none."""

    start: int
    stop: int
    token_ids: tuple[int, ...] = ()

    def applied(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The prompt after it."""
        return (*token_ids[: self.start], *self.token_ids, *token_ids[self.stop :])


def edited(loaded: LoadedModel, cache: PromptCache, edits: Sequence[Edit]) -> PromptCache:
    """The cache of an edited prompt, without running the suffix again.

    Args:
        loaded: the model.
        cache: of the prompt before.
        edits: in order, apart from each other; places are those of the prompt before. The first
            one leaves a token before it.

    Raises:
        KvtuneError: edits overlap or lie outside the prompt, or a layer slides.
    """
    return asked_edited(loaded, cache, edits, ())[0]


def asked_edited(
    loaded: LoadedModel, cache: PromptCache, edits: Sequence[Edit], question: Sequence[int]
) -> tuple[PromptCache, Tensor | None]:
    """The same, with a question behind it whose tokens run in the pass of those that are new.

    Returns:
        The cache, of the question too, and the question's logits ``[C, vocabulary]`` or None.
    """
    tokens, asked = tokens_of(cache), len(question)
    _check(edits, tokens)
    longest = tokens + sum(len(edit.token_ids) for edit in edits) + asked
    refuse_windows(loaded, longest)
    if not edits and not asked:
        return cache, None
    found = part_of(cache, slice(0, edits[0].start if edits else tokens))
    ids, places = list[int](), list[int]()
    for edit, following in zip(edits, [*(e.start for e in edits[1:]), tokens], strict=True):
        ids += edit.token_ids
        places += range(tokens_of(found), tokens_of(found) + len(edit.token_ids))
        found = with_room(found, len(edit.token_ids))
        kept = part_of(cache, slice(edit.stop, following))
        found = joined([found, moved(loaded, kept, tokens_of(found) - edit.stop)])
    ids += question
    places += range(tokens_of(found), tokens_of(found) + asked)
    found = with_room(found, asked)
    return found, run_anew(loaded, ids, places, found, asked=asked) if ids else None


def _check(edits: Sequence[Edit], tokens: int) -> None:
    places = [1, *(place for edit in edits for place in (edit.start, edit.stop)), tokens]
    if any(later < earlier for earlier, later in itertools.pairwise(places)):
        raise KvtuneError(
            f"edits must follow one another within the prompt's {tokens} tokens, behind its first",
            hint="sort them, and join those that overlap.",
        )
