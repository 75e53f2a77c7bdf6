"""Replaying a method that evicts while tokens are generated, on the queries of a recorded run.

The recorded run had the full cache, so that its queries, keys and values do not feel what is
evicted (open loop): an optimistic bound. The cache that is stepped is the very object that
a live generation steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.policies.decode import FREE, DecodeMethod
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache
from kvtune.simulator.quality.replay import LayerReplay


@dataclass(frozen=True)
class DecodeReplay:
    """One layer under one method at several budgets.

    Args:
        output: attention output at the observed positions, ``[B, H, G, C, D]``.
        mass: share of the full run's attention that lies on what was visible, mean over the head
            group, ``[B, H, C]``.
        cosine: of the attention under the method with the full run's, mean over the head group,
            ``[B, H, C]``. With the same logits, which
            hold where positions are kept, it is the ratio of their norms.
        cache: as it stood after the last token.
    """

    output: Tensor
    mass: Tensor
    cosine: Tensor
    cache: SlotCache


@torch.no_grad()
def replay_decoding(
    layer: LayerReplay, method: DecodeMethod, budgets: NDArray[np.int64]
) -> DecodeReplay:
    """Step the observed tokens through a cache, one after the other.

    Args:
        layer: its observed tokens count as generated.
        method: evicts.
        budgets: entries that may stay, ``[B, H]``.
    """
    observed = layer.keys.shape[1]
    prompt = prompt_of(method, layer.signals, budgets)
    cache = SlotCache(method, prompt, layer.signals, budgets, observed)
    rows = full_attention(layer)
    outputs, seen = [], []
    for t in range(observed):
        token = layer.queries[:, :, t], layer.keys[:, t], layer.values[:, t]
        seen.append(_visible(cache, rows[:, :, t]))
        outputs.append(cache.step(*(x.expand(len(budgets), *x.shape) for x in token)))
    mass, cosine = torch.stack(seen, -1)
    return DecodeReplay(torch.stack(outputs, -2), mass, cosine, cache)


def full_attention(layer: LayerReplay) -> Tensor:
    """Attention of the observed queries in the full-cache run, ``[H, G, C, N]``."""
    keys = torch.cat((layer.signals.keys, layer.keys), 1)[:, None]
    logits = layer.queries @ keys.transpose(-1, -2) * layer.signals.scale
    observed = layer.keys.shape[1]
    later = torch.ones(observed, observed, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., -observed:].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def _visible(cache: SlotCache, row: Tensor) -> Tensor:
    """Mass and cosine of what the next token will see, ``[2, B, H]``.

    Args:
        cache: before that token enters.
        row: its attention in the full-cache run, ``[H, G, N]``.
    """
    positions = cache.state.positions[:, :, None].expand(-1, -1, row.shape[1], -1)
    drawn = row.expand(len(positions), *row.shape).gather(-1, positions.clamp_min(0))
    drawn = drawn * (positions != FREE)
    own = row[..., cache.state.now + 1, None].expand(*drawn.shape[:-1], 1)
    drawn = torch.cat((drawn, own), -1)
    return torch.stack((drawn.sum(-1), drawn.norm(dim=-1) / row.norm(dim=-1))).mean(-1)
