"""What takes more passes of the model over a prompt that it has read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kvtune.traces.reconstruction import repeat
from kvtune.traces.self_study import study_queries

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

ASKED = ("reconstruction", "repeat_queries", "study_queries")
"""Signals that need such passes."""


def asked_again(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    cache: Sequence[tuple[Tensor, Tensor]],
    names: Collection[str],
) -> list[dict[str, Tensor]]:
    """Those of ``ASKED`` that are named, by name, for each layer.

    Args:
        loaded: the model.
        token_ids: the prompt [P].
        cache: its keys and values, (k, v) a layer, each [1, H, P, D].
        names: of the signals.
    """
    found: list[dict[str, Tensor]] = [{} for _ in cache]
    if "reconstruction" in names or "repeat_queries" in names:
        for layer, repeated in zip(found, repeat(loaded, token_ids, cache), strict=True):
            both = {"reconstruction": repeated.scores, "repeat_queries": repeated.queries}
            layer |= {name: tensor for name, tensor in both.items() if name in names}
    if "study_queries" in names:
        for layer, queries in zip(found, study_queries(loaded, token_ids, cache), strict=True):
            layer["study_queries"] = queries
    return found
