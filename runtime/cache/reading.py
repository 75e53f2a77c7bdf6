"""Prompts of a batch as a layer reads them, and what its methods are shown of them.

Where heads choose alone, several prompts lie side by side as if they were heads of one: methods are
then asked once for many, which takes little longer than for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from kvtune.runtime.cache.policy_cache import PolicyCache

ASKED_AT_ONCE = 32768
"""Tokens of prompts that a method is asked about at once: the room that one long prompt takes."""


def lengths_of(k: Tensor, padding: Tensor | None) -> list[int]:
    """Tokens of each prompt."""
    lengths: list[int] = padding.sum(1).tolist() if padding is not None else [k.shape[2]] * len(k)
    return lengths


def equally_long(prompts: Sequence[int], tokens: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where, in ``[B, H, P, D]``, neighbours of one length are, padding aside."""
    start = 0
    for count, run in itertools.groupby(prompts):
        stop = start + len(list(run))
        yield slice(start, stop), slice(None), slice(tokens - count, None)
        start = stop


def padded(outputs: Sequence[Tensor], tokens: int) -> Tensor:
    """``[B, Hq, P, D]`` with zeros before shorter prompts; one part of full length as it is."""
    if len(outputs) == 1 and outputs[0].shape[2] == tokens:
        return outputs[0]
    return torch.cat([F.pad(part, (0, 0, tokens - part.shape[2], 0)) for part in outputs])


def signals_of(
    cache: PolicyCache, layer: int, prompts: tuple[Tensor, Tensor, Tensor], scale: float
) -> list[Signals]:
    """What methods may look at, of some equally long prompts.

    Args:
        cache: says what is needed.
        layer: which.
        prompts: queries ``[B, Hq, P, D]``, keys and values ``[B, H, P, D]``.
        scale: of the logits.
    """
    q, k, v = prompts
    needs, sums, tokens = cache.needs, torch.empty(len(q), 0), k.shape[2]
    if needs.column_sums and cache.backend.has_kernels:
        needs, sums = replace(needs, column_sums=False), column_sums(q, k, scale)
    count = _asked_at_once(cache, layer, tokens)
    if count > 1:  # queries that nobody looks at need not be copied
        q = q[:, :, tokens - needs.queries(tokens) :]
    parts = zip(*(x.split(count) for x in (q, k, v, sums)), strict=True)
    return [_side_by_side(cache, layer, scale, *part) for part in parts]


def _asked_at_once(cache: PolicyCache, layer: int, tokens: int) -> int:
    """Prompts of this length."""
    together = cache.policy.chooses_head_by_head(layer) and not (cache.waits or cache.evicts)
    together = together and not cache.needs.sentences  # which each prompt has of its own
    return max(1, ASKED_AT_ONCE // max(1, tokens)) if together else 1


def _side_by_side(
    cache: PolicyCache, layer: int, scale: float, q: Tensor, k: Tensor, v: Tensor, sums: Tensor
) -> Signals:
    """Of n prompts; ``sums`` ``[n, Hq, P]``, or empty."""
    given: dict[str, Any] = {}
    if cache.calibration:
        measured = cache.calibration.tensors(layer, k.device)
        given = {**measured, "layer_error": float(measured["layer_error"])}
    if cache.learned:
        given["learned"] = cache.learned[layer]
    drawn = sums.flatten(0, 1) if sums.numel() else None
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    rope = cache.geometry.rope_at(layer)
    return Signals(q, k, v, scale, drawn, layer=layer, rope=rope, **given)


def column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention that each key drew, ``[B, Hq, P]`` float32; one launch."""
    from kvtune.runtime.kernels import columns

    flat_q, flat_k = (x.flatten(0, 1).contiguous() for x in (q, k))
    return columns.column_sums(flat_q, flat_k, scale).view(q.shape[:3])
