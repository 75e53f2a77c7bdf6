"""The signals of a prompt from what capture recorded, and of several prompts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvtune.policies.signals import Future, Signals

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.common.rotary import Rope


def recorded_signals(
    tensors: Mapping[str, Tensor], prompt: int, scale: float, layer: int, rope: Rope | None
) -> Signals:
    """The signals of a recorded layer, by the names that capture gives its tensors.

    Args:
        tensors: ``q`` ``[Hq, Q, D]`` (all or a tail that ends with the observed ones), ``k``
            and ``v`` ``[H, N, D]``, and the signals that were asked for.
        prompt: P; the tokens after it were observed.
        scale: factor of the scores before the softmax.
        layer: which.
        rope: its rotary positions.
    """
    queries, keys, values = tensors["q"], tensors["k"], tensors["v"]
    first = queries.shape[1] - (keys.shape[1] - prompt)
    moments = tuple(tensors[n] for n in ("query_mean", "query_covariance") if n in tensors)
    error, ends = tensors.get("layer_error"), tensors.get("sentence_ends")
    return Signals(
        queries[:, :first],
        keys[:, :prompt],
        values[:, :prompt],
        scale,
        tensors.get("column_sums"),
        layer=layer,
        rope=rope,
        recorded_query_moments=moments if len(moments) == 2 else None,
        recorded_later_queries=tensors.get("later_queries"),
        reconstruction=tensors.get("reconstruction"),
        head_scores=tensors.get("head_scores"),
        layer_error=None if error is None else float(error),
        sentence_ends=None if ends is None else ends.bool(),
        repeat_queries=tensors.get("repeat_queries"),
        study_queries=tensors.get("study_queries"),
        future=Future(
            queries[:, first:], keys[:, prompt:], values[:, prompt:], tensors.get("probes")
        ),
    )


def signals_side_by_side(several: Sequence[Signals]) -> Signals:
    """One layer of several prompts of one length, for methods that look at no other head.

    What is no head's own (sentence ends, what was measured on the model, the observed tokens)
    is left out.
    """
    import torch

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given) if given else None

    own = ((each.queries, each.keys, each.values) for each in several)
    queries, keys, values = (torch.cat(tensors) for tensors in zip(*own, strict=True))
    moments = [each.recorded_query_moments or (None, None) for each in several]
    means, covariances = (joined(tensors) for tensors in zip(*moments, strict=True))
    return Signals(
        queries,
        keys,
        values,
        several[0].scale,
        joined([each.recorded_column_sums for each in several]),
        layer=several[0].layer,
        rope=several[0].rope,
        recorded_query_moments=(
            None if means is None or covariances is None else (means, covariances)
        ),
        recorded_later_queries=joined([each.recorded_later_queries for each in several]),
        reconstruction=joined([each.reconstruction for each in several]),
    )
