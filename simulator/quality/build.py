"""Builds Gram tables from a trace: every option replayed on every layer of every sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from kvtune.common.progress import Progress, Silent
from kvtune.policies.apply import linked
from kvtune.policies.option import Option
from kvtune.policies.signals import Signals
from kvtune.simulator.quality.replay import LayerReplay, replay_options
from kvtune.simulator.quality.tables import Floats, SampleFacts, Tables
from kvtune.traces.signals import tensors_of
from kvtune.traces.trace import SampleRecord, Trace

DEFAULT_BLOCK = 16
_REPLAYED = ("q", "k", "v", "probes")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Cell:
    sample: int
    layer: int


def build_tables(
    trace: Trace,
    options: Sequence[Option],
    *,
    samples: Sequence[SampleRecord] | None = None,
    block: int = DEFAULT_BLOCK,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tables:
    """Tables of a trace's samples, one exact factor a sample.

    Args:
        trace: captured with probes.
        options: what to replay; each is replayed on every KV head.
        samples: some of the trace's; all of them unless given.
        block: positions whose responses are summed before squaring.
        device: where the arithmetic runs.
        progress: told of every (sample, layer).
    """
    samples = trace.samples if samples is None else samples
    layers, heads = trace.geometry.layers, trace.geometry.kv_heads
    cells = [_Cell(s, layer) for s in range(len(samples)) for layer in range(layers)]
    rows: list[list[Floats]] = [[] for _ in samples]

    names = (*_REPLAYED, *tensors_of(trace.manifest["signals"]))

    def load(cell: _Cell) -> LayerReplay:
        id_ = samples[cell.sample].id

        def signals(layer: int) -> Signals:
            return LayerReplay.of(trace.layer(id_, layer, device, names=_REPLAYED), device).signals

        replay = LayerReplay.of(trace.layer(id_, cell.layer, device, names=names), device)
        return replace(replay, signals=linked(replay.signals, options, layers, signals))

    parts = ahead(load, cells)
    for cell in (progress or Silent()).track(cells, "replaying options", len(cells)):
        rows[cell.sample].append(layer_features(next(parts), options, block))
    factor = np.stack([np.concatenate(row) for row in rows])  # [n, I, O, S * C / block]
    first = samples[0]
    return Tables(
        model=str(trace.manifest["model"]["name"]),
        layers=layers,
        kv_heads=heads,
        head_dim=trace.geometry.head_dim,
        prompt_tokens=first.prompt,
        options=tuple(options),
        samples=tuple(SampleFacts(s.id, s.split, s.kind) for s in samples),
        loss=(factor**2).sum(-1),
        factor=factor,
        group=np.arange(len(samples)),
    )


def ahead(load: Callable[[T], R], items: Iterable[T], depth: int = 2) -> Iterator[R]:
    """Load items in order, a few ahead of their use, so that reading and arithmetic overlap."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(reader.submit(load, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def layer_features(layer: LayerReplay, options: Sequence[Option], block: int) -> Floats:
    """Block-summed responses of one layer, ``[H, O, S * C / block]``, square root of nats/token.

    KL a token is about 1 / (2 C) of the mean over probes of the summed squares, so a feature is
    a response over the square root of 2 C S.
    """
    responses = replay_options(layer, options, block)
    probes, observed = layer.probes.shape[:2]
    features: Floats = (responses.flatten(2) / (2 * observed * probes) ** 0.5).cpu().numpy()
    return features
