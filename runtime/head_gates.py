"""Gates of KV heads: how much of a head's attention to everything is mixed with that nearby.

DuoAttention and RLKV learn such gates with the model's weights as they are; what they mix is here,
what they learn from is ``duo_gates`` and ``rlkv_gates``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvtune.policies.head_scores import About, HeadScores
from kvtune.traces.models import LoadedModel
from kvtune.traces.seam import causal_attention


def open_gates(loaded: LoadedModel) -> Tensor:
    """One gate a KV head, all of them 1, ``[L, H]`` float32 with a gradient."""
    shape = loaded.geometry.layers, loaded.geometry.kv_heads
    return torch.ones(shape, device=loaded.device, requires_grad=True)


def gated(gates: Tensor, sinks: int, window: int) -> Callable[..., Tensor]:
    """Attention that mixes each head's whole and near attention by its gate, for ``attending``."""

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, limit: int | None
    ) -> Tensor:
        whole = causal_attention(q, k, v, scale, limit)
        near = near_attention(q, k, v, scale, sinks, window)
        gate = gates[layer].repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None]
        return (gate * whole + (1 - gate) * near).to(q.dtype)

    return handler


def near_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: int, window: int
) -> Tensor:
    """Causal attention ``[B, Hq, T, D]`` to the first tokens and the newest ones alone."""
    keys = k.shape[2]
    at = torch.arange(keys - q.shape[2], keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    seen = (key <= at) & ((key < sinks) | (key > at - window))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)


def gate_scores(
    loaded: LoadedModel, name: str, gates: Tensor, method: str, data: str, seed: int
) -> HeadScores:
    """The gates as head scores of one name.

    Args:
        loaded: whose they are.
        name: of the score.
        gates: ``[L, H]``.
        method: that learned them.
        data: from what.
        seed: of what was drawn.
    """
    about = About("KV heads", method, data, seed)
    scores = {name: gates.detach().cpu().numpy()}
    return HeadScores(loaded.name, loaded.fingerprint, scores, {name: about})


@contextmanager
def weights_fixed(model: torch.nn.Module) -> Iterator[None]:
    """No gradient of weights is kept until the block ends."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
