"""Through which attention a model answers while compressed caches are given to it, and before."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.traces.self_check import set_attention

NAME = "kvtune_paged"
"""The attention implementation that hands queries to the cache."""

_before: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""The implementation that each model had when its first cache was loaded."""


@dataclass(frozen=True)
class Answering:
    """A model that answers through compressed caches, referred to weakly.

    Args:
        model: the reference.
    """

    model: weakref.ref[Any]

    @classmethod
    def begin(cls, model: Any) -> Answering:
        """Let the model answer through the caches that it is given from now on."""
        attention = _implementation(model)
        if attention != NAME:
            _before[model] = attention
        set_attention(model, NAME)
        return cls(weakref.ref(model))

    def end(self) -> None:
        """Let the model answer as it did before, unless something else has been set since."""
        model = self.model()
        if model is not None and _implementation(model) == NAME:
            model.set_attn_implementation(_before[model])

    def check(self) -> None:
        """Refuse tokens that another attention would answer, which sees nothing of the prompt.

        Raises:
            KvtuneError: the model does not answer through compressed caches.
        """
        model = self.model()
        if model is not None and _implementation(model) != NAME:
            raise KvtuneError(
                "the model was given a compressed cache, and no longer answers through one",
                hint="use the cache inside its `with load_cache(...)` block, or load another.",
            )


def _implementation(model: Any) -> str:
    name: str = model.config.get_text_config()._attn_implementation
    return name
