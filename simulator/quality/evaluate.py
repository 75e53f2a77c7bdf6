"""Replay of whole policies: exact for one configuration, on every sample asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvtune.common.kept import NOTHING_KEPT, Kept, said
from kvtune.common.progress import Progress, Silent
from kvtune.policies.apply import apply_together, linked
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.simulator.quality.build import (
    DEFAULT_BLOCK,
    ahead,
    readers_for,
    replayed,
    replayed_tensors,
)
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.simulator.quality.tables import Floats
from kvtune.traces.trace import SampleRecord, Trace

_TOGETHER, _TOGETHER_ON_A_GPU = 8, 32  # policies a batch; the first is for a laptop's memory


def replay_policies(
    trace: Trace,
    samples: Sequence[SampleRecord],
    policies: Sequence[Policy],
    *,
    every: int = 1,
    block: int = DEFAULT_BLOCK,
    device: str = "cpu",
    progress: Progress | None = None,
    kept: Kept = NOTHING_KEPT,
) -> Floats:
    """Predicted KL of every policy on every sample, ``[policies, samples]`` nats/token.

    Args:
        trace: captured with probes.
        samples: of the trace.
        policies: for its model's shape.
        every: 1 replays all layers; 3 every third, a rough figure that serves to screen many.
        block: positions whose responses are summed before squaring.
        device: where the arithmetic runs.
        progress: told of every sample.
        kept: replays of this trace that were done before; new ones are put there.

    Raises:
        KvtuneError: a policy has another shape than the traced model.
    """
    for policy in policies:
        policy.check_fits(trace.geometry.layers, trace.geometry.kv_heads)
    steps = (progress or Silent()).track(samples, "replaying policies", len(samples))
    depth = trace.geometry.layers
    layers = range(min(every // 2, depth - 1), depth, every)  # one at least, of a shallow model
    # Policies say all of their heads, which takes long: once, and not for every sample.
    which = said([replace(policy, name="") for policy in policies])

    def key(sample: SampleRecord) -> tuple[object, ...]:
        return "replay", sample.id, tuple(layers), block, which

    known = {s.id: arrays["losses"] for s in samples if (arrays := kept.get(*key(s))) is not None}
    waiting = [sample for sample in samples if sample.id not in known]
    found = replayed(
        lambda sample: sample,
        lambda sample: _replay_sample(trace, sample, policies, layers, block, device),
        waiting,
        device,
    )
    for sample in steps:
        if sample.id not in known:
            known[sample.id] = next(found)
            kept.put({"losses": known[sample.id]}, *key(sample))
    return np.stack([known[sample.id] for sample in samples], 1)


@torch.no_grad()
def _replay_sample(
    trace: Trace,
    sample: SampleRecord,
    policies: Sequence[Policy],
    layers: range,
    block: int,
    device: str,
) -> Floats:
    together = _TOGETHER if device == "cpu" else _TOGETHER_ON_A_GPU
    names = replayed_tensors(trace)

    def load(index: int) -> LayerReplay:
        return LayerReplay.of(trace.layer(sample.id, index, device, names=names), device)

    read: dict[int, LayerReplay] = {}  # allocators that compare layers read all, before any is used

    def prompt(index: int) -> Signals:
        if index not in read:
            read[index] = load(index)
        return read[index].signals

    readers = readers_for(device)
    if any(policy.compares_layers for policy in policies):
        every = range(trace.geometry.layers)
        read.update(zip(every, ahead(load, every, readers), strict=True))
    budgets = [policy.settle(sample.prompt, prompt) for policy in policies]
    known = frozenset(read)  # a linked layer that is asked for below is read besides
    waiting = ahead(load, [index for index in layers if index not in known], readers)
    total: torch.Tensor | float = 0.0
    probes = 1
    for index in layers:
        layer = read.pop(index) if index in known else next(waiting)
        probes = layer.probes.shape[0]
        options = [option for policy in policies for option in policy.heads[index]]
        signals = linked(layer.signals, options, trace.geometry.layers, prompt)
        planned = [budget[index].tolist() for budget in budgets]
        pieces = []
        for at in range(0, len(policies), together):
            some = slice(at, at + together)
            part = apply_together(policies[some], index, planned[some], signals)
            pieces.append(layer.response(part, block).sum(1))  # over heads: [B, S, C / block]
        total = total + torch.cat(pieces)
    squares = (torch.as_tensor(total) ** 2).sum((1, 2))
    losses: Floats = (squares / (2 * sample.observed * probes)).cpu().numpy()
    return losses
