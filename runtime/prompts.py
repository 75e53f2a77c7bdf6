"""Where a live run's prompt comes from: run now on the model, or read back from a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.signals import Needs, Signals
from kvtune.traces.geometry import Geometry
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_prompt
from kvtune.traces.samples import Sample
from kvtune.traces.signals import column_sums
from kvtune.traces.trace import LayerTrace, SampleRecord, Trace

Prompt = Callable[[int], Signals]
"""Gives a layer's prompt, as methods may see it."""


def refuse_window(layer: int, window: int | None, tokens: int) -> None:
    """A sliding-window layer forgets by itself; compressing it is not supported yet."""
    if window is not None and window < tokens:
        raise KvtuneError(
            f"layer {layer} attends to a sliding window of {window} of {tokens} tokens",
            hint="use samples no longer than the window; only full attention can be compressed.",
        )


def traced_prompt(trace: Trace, sample: SampleRecord, device: str) -> Prompt:
    """The prompt that a trace recorded: nothing is run again."""
    return lambda layer: layer_signals(trace.layer(sample.id, layer, device=device))


def layer_signals(layer: LayerTrace) -> Signals:
    """What methods may look at, of one traced layer; its prompt queries may be a tail."""
    refuse_window(layer.layer, layer.window, layer.prompt_tokens)
    return Signals.recorded(
        layer.tensors, layer.prompt_tokens, layer.scale, layer.layer, layer.rope
    )


@dataclass
class _Kept:
    """Collects each layer's signals while the prompt runs, no more than ``needs`` asks for."""

    needs: Needs
    geometry: Geometry
    layers: list[Signals] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        geometry = self.geometry
        refuse_window(layer, geometry.windows[layer], q.shape[2])
        tail = min(self.needs.window, q.shape[2])
        sums = None
        if self.needs.column_sums:
            sums = column_sums(q[0], k[0], geometry.scale, geometry.windows[layer])
        queries = q[0, :, q.shape[2] - tail :].clone()  # a view would keep all queries alive
        whole = queries.float(), k[0].float(), v[0].float(), geometry.scale, sums
        self.layers.append(Signals(*whole, layer=layer, rope=geometry.rope_at(layer)))


@torch.no_grad()
def fresh_prompt(loaded: LoadedModel, sample: Sample, needs: Needs) -> Prompt:
    """Run the prompt on the model now and keep its cache and the signals asked for."""
    kept = _Kept(needs, loaded.geometry)
    run_prompt(loaded, sample.token_ids[: sample.prompt], kept)
    return kept.layers.__getitem__
