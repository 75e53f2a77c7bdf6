"""Generating with SkipDecode's schedule on a real model, UNTRAINED: its layers are just left out.

The authors fine-tune a model to the schedule; without that, answers get worse with every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import cache_argument
from kvtune.policies.skip_decode import SkipDecode


@dataclass
class _Place:
    """The generated token that the model reads now; 0 while it reads the prompt."""

    position: int = 0


@dataclass(frozen=True)
class SkippedRun:
    """What was generated, and what that took.

    Args:
        tokens: ``[B, T]``.
        cached: tokens that each layer's cache holds at the end, ``[L]``.
    """

    tokens: Tensor
    cached: list[int]


@torch.no_grad()
def generate_skipping(model: Any, ids: Tensor, schedule: SkipDecode, new_tokens: int) -> SkippedRun:
    """Greedy tokens, each through the layers of its place in the schedule.

    Args:
        model: a transformers causal language model with a list of decoder layers.
        ids: prompts of equal length, ``[B, N]``.
        schedule: for its number of layers.
        new_tokens: T; the last one is not read by the model any more.

    Raises:
        KvtuneError: a schedule of another number of layers.
    """
    from transformers import DynamicCache

    cache, drawn = DynamicCache(config=model.config), []
    with skipping(model, schedule) as place:
        for position in range(new_tokens):
            place.position = max(position - 1, 0)  # the token that is read was generated before
            out = model(
                input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)
            )
            ids = out.logits[:, -1:].argmax(-1)
            drawn.append(ids)
    cached = [cache.get_seq_length(layer) for layer in range(schedule.layers)]
    return SkippedRun(torch.cat(drawn, 1), cached)


@contextmanager
def skipping(model: Any, schedule: SkipDecode) -> Iterator[_Place]:
    """Let layers pass on what they are given where the schedule leaves them out."""
    layers = model.get_decoder().layers
    if len(layers) != schedule.layers:
        raise KvtuneError(f"the model has {len(layers)} layers, the schedule {schedule.layers}")
    place = _Place()
    with ExitStack() as undo:
        for number, layer in enumerate(layers):
            layer.forward = _maybe(layer.forward, number, schedule, place)
            undo.callback(layer.__dict__.pop, "forward")
        yield place


def _maybe(forward: Any, number: int, schedule: SkipDecode, place: _Place) -> Any:
    """The layer's forward pass where it runs; else nothing is done."""

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if number in schedule.runs(place.position):
            return forward(hidden_states, *args, **kwargs)
        return hidden_states

    return call
