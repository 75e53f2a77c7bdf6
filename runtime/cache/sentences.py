"""Where sentences end in what a cache's sequences are given, for readers that go by them.

A cache is shown keys and values, never text. What the model is given to read, the prompt and each
token after it, is therefore looked at before it does, and remembered as one flag a token.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import is_given
from kvtune.traces.sentences import ends_sentence
from kvtune.traces.workloads import codec_of

if TYPE_CHECKING:
    from kvtune.runtime.cache.policy_cache import PolicyCache


class SentenceEnds:
    """Which tokens of each sequence of a cache end a sentence.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = codec_of(tokenizer).decode
        self._known: dict[int, bool] = {}
        self._flags: dict[int, list[Tensor]] = {}  # piece by piece, joined when they are asked for
        self._width: dict[int, int] = {}  # of what was given first: a prompt and its padding

    def told(self, token_ids: Tensor, sequences: range) -> None:
        """The model is about to read further tokens ``[n, T]``, or ``[1, T]`` for all, of these."""
        rows = torch.tensor([[self._ends(token) for token in row] for row in token_ids.tolist()])
        for number, sequence in enumerate(sequences):
            self._width.setdefault(sequence, rows.shape[1])
            self._flags.setdefault(sequence, []).append(rows[number % len(rows)])

    def of(self, sequence: int, prompt_tokens: int) -> Tensor:
        """One flag for each token of a sequence whose prompt has so many, ``[N]`` bool."""
        self._flags[sequence] = [torch.cat(self._flags[sequence])]
        return self._flags[sequence][0][self._width[sequence] - prompt_tokens :]

    def _ends(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = ends_sentence(self._decode(token))
        return self._known[token]


def watch(model: Any, cache: PolicyCache, ends: SentenceEnds) -> None:
    """Tell ``ends`` of whatever the model is about to read into a cache.

    Args:
        model: a transformers causal language model.
        cache: that will be given to it; nothing remains of this when it is gone.
        ends: is told.
    """
    mine = weakref.ref(cache)

    def hook(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        read = mine()
        if read is None or not is_given(read, args, given):
            return
        ids = given.get("input_ids", args[0] if args else None)
        if ids is None:
            raise KvtuneError("tokens that are given as embeddings do not say where sentences end")
        ends.told(ids, read.reading or range(len(read.prompts) or len(ids)))

    handle = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    weakref.finalize(cache, handle.remove)
