"""Policies that choose when the whole model has read a prompt, or that must know the model first.

KVzip asks the model to repeat its prompt, and some allocators compare layers: until the last layer
has answered, every layer's keys and values are held uncompressed. A hook on the model says when
the prompt has been read, and what it was. CompressKV reads what was measured on the model once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Bars
from kvtune.common.transformers_interface import attention_restored, is_given
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs, Signals
from kvtune.traces import seam
from kvtune.traces.asking import ASKED, asked_again
from kvtune.traces.calibration import Calibration, find_calibration, require_calibration
from kvtune.traces.geometry import Geometry
from kvtune.traces.models import LoadedModel, fingerprint


class Reader(Protocol):
    """A cache that waits for a prompt's end."""

    def read(self, token_ids: Tensor | None) -> bool:
        """Told the token ids ``[B, P]`` that the model was given; whether more will follow."""


def when_read(model: Any, cache: Reader) -> None:
    """Tell a cache whenever the model has read prompts into it.

    Args:
        model: a transformers causal language model.
        cache: that will be given to it; nothing remains of this when it is gone before.
    """
    mine = weakref.ref(cache)

    def hook(_: Any, args: tuple[Any, ...], given: dict[str, Any], __: Any) -> None:
        waiting = mine()
        if waiting is not None and is_given(waiting, args, given):
            more = waiting.read(given.get("input_ids", args[0] if args else None))
            if not more:
                handle.remove()

    handle = model.base_model.register_forward_hook(hook, with_kwargs=True)
    weakref.finalize(cache, handle.remove)


def calibration_for(model: Any, geometry: Geometry, tokenizer: Any) -> Calibration:
    """What was measured on this model; with a tokenizer it is measured if need be, and kept.

    Raises:
        KvtuneError: it was never measured, and there is no tokenizer to do so now.
    """
    name = fingerprint(model, geometry)
    if tokenizer is None:
        return require_calibration(name)
    found = find_calibration(name)
    if found is None:
        from kvtune.runtime.calibrate import calibration_of

        with _loaded(model, geometry, tokenizer, name) as loaded:
            found = calibration_of(loaded, Bars())
    return found


def repeated(
    model: Any,
    geometry: Geometry,
    tokenizer: Any,
    needs: Needs,
    token_ids: list[int],
    read: list[Signals],
) -> list[Signals]:
    """A prompt's signals ``[L]`` with those added that take more passes over it."""
    cache = [(signals.keys[None], signals.values[None]) for signals in read]
    names = [name for name in ASKED if getattr(needs, name)]
    answers: list[dict[str, Any]]
    with _loaded(model, geometry, tokenizer) as loaded:
        answers = [*asked_again(loaded, token_ids, cache, names)]
    pairs = zip(read, answers, strict=True)
    return [replace(signals, **answer, _memo={}) for signals, answer in pairs]


def condensed(signals: Signals, needs: Needs) -> Signals:
    """Without the queries that nothing will ask for; what all of them tell is told now."""
    tail = min(needs.window, signals.prompt_tokens)
    queries = signals.queries[:, signals.prompt_tokens - tail :].clone()
    sums, moments = signals.recorded_column_sums, signals.recorded_query_moments
    if needs.column_sums:
        sums = signals.column_sums().flatten(0, 1)
    if needs.query_moments:
        mean, covariance = signals.query_moments()
        moments = mean.flatten(0, 1), covariance.flatten(0, 1)
    later = signals.recorded_later_queries
    if needs.later_queries:
        later = signals.later_queries().flatten(0, 1)
    return replace(
        signals,
        queries=queries,
        recorded_column_sums=sums,
        recorded_query_moments=moments,
        recorded_later_queries=later,
        _memo={},
    )


@contextmanager
def _loaded(
    model: Any, geometry: Geometry, tokenizer: Any, name: str = ""
) -> Iterator[LoadedModel]:
    """The model as validation knows it, answering through the seam until the block ends."""
    device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
    seam.register()
    with attention_restored(model), torch.no_grad():
        model.set_attn_implementation(seam.NAME)
        yield LoadedModel(model, tokenizer, "", name, geometry, device, dtype, "as given")


def check_passes(policy: Policy, tokenizer: Any) -> None:
    """Refuse policies that need more than reading a prompt, and repeating it, gives.

    Raises:
        KvtuneError: says what is missing.
    """
    needs = policy.needs
    if needs.future or needs.probes:
        raise KvtuneError(
            f"the policy {policy.name!r} looks at what comes after the prompt: it is a bound",
            hint="kvtune validate runs it; nobody can serve it.",
        )
    if needs.sentences and tokenizer is None:
        raise KvtuneError(
            f"the policy {policy.name!r} reads where sentences end, and a cache sees no text",
            hint="give load_cache(..., tokenizer=).",
        )
    if needs.asks_model and tokenizer is None:
        raise KvtuneError(
            f"the policy {policy.name!r} asks the model to repeat its prompt, in words",
            hint="give load_cache(..., tokenizer=).",
        )
