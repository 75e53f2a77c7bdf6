"""KVShare's second stage: while an answer is generated, a few reused tokens run anew in each step.

After Yang et al., "KVShare", arXiv 2503.16525, and its released code: reused tokens that the first
stage left as they were cached wait in order of their places; three of them ride along with every
generated token, at their own places, and their new keys and values take the place of the old ones
in every layer, until none waits. A step that reads the model's weights anyway runs four rows
instead of one. Where the first stage ran nothing anew, what has been refreshed is exact: each token
sees exact ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.runtime.reuse.blending import Blended
from kvtune.runtime.reuse.passes import PromptCache, run_anew, tokens_of, with_room
from kvtune.traces.models import LoadedModel

A_STEP = 3


class Refreshing:
    """A blended cache that answers token by token, and becomes more exact with each.

    Attributes:
        cache: of the prompt, the question and room for the answer.
        waiting: places of reused tokens that are still as they were cached, ascending.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        found: Blended,
        token_ids: Sequence[int],
        new_tokens: int,
        a_step: int = A_STEP,
    ) -> None:
        """Begin behind a prompt.

        Args:
            loaded: the model.
            found: the first stage's answer.
            token_ids: of the prompt, and of the question where there is one.
            new_tokens: that will be generated at most.
            a_step: waiting tokens that run with each of them; 0 leaves them as they are.

        Raises:
            KvtuneError: the cache is of another number of tokens.
        """
        if tokens_of(found.cache) != len(token_ids):
            raise KvtuneError(
                f"{len(token_ids)} tokens, but a cache of {tokens_of(found.cache)}",
                hint="give the prompt's tokens and the question's that were blended.",
            )
        self.cache: PromptCache = with_room(found.cache, new_tokens)
        self.waiting: list[int] = found.stale.tolist()
        self._loaded, self._ids, self._a_step = loaded, list(token_ids), a_step

    def logits(self, token_id: int) -> Tensor:
        """Of what follows the newest token of the answer, ``[vocabulary]``.

        Raises:
            KvtuneError: there is no room for another token.
        """
        place = len(self._ids)
        if place == tokens_of(self.cache):
            raise KvtuneError("the answer is longer than was asked for", hint="raise new_tokens.")
        self._ids.append(token_id)
        riding, self.waiting = self.waiting[: self._a_step], self.waiting[self._a_step :]
        places = [*riding, place]
        mine = [self._ids[each] for each in places]
        found = run_anew(self._loaded, mine, places, self.cache, asked=1)
        if found is None:
            raise RuntimeError("a token was asked for, and no logits came")
        return found[0]
