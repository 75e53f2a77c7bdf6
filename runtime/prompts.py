"""Where a live run's prompt comes from: run now on the model, or read back from a trace."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.common.rotary import later_queries, query_moments
from kvtune.policies.recorded import recorded_signals
from kvtune.policies.signals import Future, Needs, Signals
from kvtune.traces.asking import ASKED, asked_again
from kvtune.traces.calibration import Calibration, require_calibration
from kvtune.traces.capture import Observed, observe
from kvtune.traces.geometry import Geometry
from kvtune.traces.learned import learned_layers
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_prompt
from kvtune.traces.probes import Probes
from kvtune.traces.samples import Sample
from kvtune.traces.sentences import sentence_ends
from kvtune.traces.signals import column_sums, tensors_of
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


def traced_prompt(
    trace: Trace, sample: SampleRecord, device: str, *, probes: bool = True
) -> Prompt:
    """The prompt that a trace recorded: nothing is run again.

    ``probes`` may be left out, which are most of a trace, where no policy looks ahead.
    """
    seen = ("q", "k", "v", *(("probes",) if probes else ()))
    names = (*seen, *tensors_of(trace.manifest["signals"]))
    return lambda layer: layer_signals(trace.layer(sample.id, layer, device, names=names))


def at_once(prompt: Prompt, layers: int) -> Prompt:
    """All layers of a prompt, read by several threads, for whoever asks for them repeatedly."""
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(prompt, range(layers))).__getitem__


def layer_signals(layer: LayerTrace) -> Signals:
    """What methods may look at, of one traced layer; its prompt queries may be a tail."""
    refuse_window(layer.layer, layer.window, layer.prompt_tokens)
    return recorded_signals(
        layer.tensors, layer.prompt_tokens, layer.scale, layer.layer, layer.rope
    )


_EIGHT = Probes(8)
_READERS = 4


@dataclass
class _Recorder:
    """Collects each layer's signals while the prompt runs, no more than ``needs`` asks for."""

    needs: Needs
    geometry: Geometry
    layers: list[Signals] = field(default_factory=list)
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        window, scale = self.geometry.windows[layer], self.geometry.scale
        rope = self.geometry.rope_at(layer)
        refuse_window(layer, window, q.shape[2])
        tail = min(self.needs.window, q.shape[2])
        queries = q[0, :, q.shape[2] - tail :].clone()  # a view would keep all queries alive
        found = Signals(queries.float(), k[0].float(), v[0].float(), scale, layer=layer, rope=rope)
        if self.needs.column_sums:
            found.recorded_column_sums = column_sums(q[0], k[0], scale, window)
        if self.needs.query_moments:
            found.recorded_query_moments = query_moments(q[0], rope)
        if self.needs.later_queries:
            found.recorded_later_queries = later_queries(q[0], rope)
        self.layers.append(found)
        self.cache.append((k, v))


def fresh_prompt(
    loaded: LoadedModel, sample: Sample, needs: Needs, *, probes: Probes = _EIGHT
) -> Prompt:
    """Run the prompt on the model now and keep its cache and the signals asked for.

    Args:
        loaded: the model.
        sample: whose prompt; its observed tokens are run only where ``needs`` looks ahead.
        needs: what the policies read.
        probes: drawn where ``needs`` asks for them.

    Raises:
        KvtuneError: a calibration is needed and the model has none.
    """
    read = _Recorder(needs, loaded.geometry)
    token_ids = sample.token_ids[: sample.prompt]
    with torch.no_grad():
        run_prompt(loaded, token_ids, read)
        if more := [name for name in ASKED if getattr(needs, name)]:
            answers = asked_again(loaded, token_ids, read.cache, more)
            for signals, answer in zip(read.layers, answers, strict=True):
                vars(signals).update(answer)
    if needs.calibration:
        _add_calibration(read.layers, require_calibration(loaded.fingerprint), loaded.device)
    if needs.learned:
        layers = learned_layers(loaded.fingerprint, len(read.layers), loaded.device)
        for signals, matrices in zip(read.layers, layers, strict=True):
            signals.learned = matrices
    if needs.sentences:
        ends = sentence_ends(loaded, sample.token_ids)
        for signals in read.layers:
            signals.sentence_ends = ends
    if needs.future or needs.probes:
        drawn = probes if needs.probes else Probes(1)  # the pass itself is what the future takes
        _add_future(read.layers, observe(loaded, sample, read.cache, drawn))
    return read.layers.__getitem__


def _add_calibration(layers: list[Signals], found: Calibration, device: str) -> None:
    for layer, signals in enumerate(layers):
        signals.head_scores = found.tensors(layer, device)["head_scores"]
        signals.layer_error = found.layer_errors[layer]


def _add_future(layers: list[Signals], observed: Observed) -> None:
    for signals, row, gradients in zip(layers, observed.rows, observed.probes, strict=True):
        queries, keys, values = (tensor.float() for tensor in row[:3])
        signals.future = Future(queries, keys, values, gradients.float())
