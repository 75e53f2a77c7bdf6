"""Builds Gram tables from a trace: every option replayed on every layer of every sample."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from kvtune.common.kept import NOTHING_KEPT, Kept
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
L = TypeVar("L")

_LOADERS = 4
_SHARE_OF_MEMORY = 1 / 8
_MOST_AT_ONCE = 4 * 2**30
_CELLS_AT_ONCE = 4  # on a CPU; each has a layer in memory, and what its options make of it
_COPIES = 2  # of the scores: they are computed and turned into probabilities


@dataclass(frozen=True)
class Cell:
    """Samples whose heads of one layer are replayed as if they were one prompt's.

    How many they are decides how sums are rounded on a GPU, so that whoever shares the work out
    shares out whole cells.
    """

    samples: Sequence[int]
    layer: int


def build_tables(
    trace: Trace,
    options: Sequence[Option],
    *,
    samples: Sequence[SampleRecord] | None = None,
    block: int = DEFAULT_BLOCK,
    device: str = "cpu",
    progress: Progress | None = None,
    kept: Kept = NOTHING_KEPT,
) -> Tables:
    """Tables of a trace's samples, one exact factor a sample.

    Args:
        trace: captured with probes.
        options: what to replay; each is replayed on every KV head.
        samples: some of the trace's; all of them unless given.
        block: positions whose responses are summed before squaring.
        device: where the arithmetic runs.
        progress: told of every layer of the samples that are replayed together.
        kept: layers of this trace under these options that were replayed before; new ones are put
            there where one sample is replayed at a time, which takes long.
    """
    samples = trace.samples if samples is None else samples
    cells = cells_of(trace, samples, options, device)

    def key(cell: Cell) -> tuple[object, ...]:
        return block, [samples[at].id for at in cell.samples], cell.layer

    known = {cell: arrays["features"] for cell in cells if (arrays := kept.get(*key(cell)))}
    waiting = [cell for cell in cells if cell not in known]

    def load(cell: Cell) -> LayerReplay:
        return load_cell(trace, samples, cell, options, device)

    found = replayed(load, lambda layer: layer_features(layer, options, block), waiting, device)
    for cell in (progress or Silent()).track(waiting, "replaying options", len(waiting)):
        known[cell] = next(found)
        if len(cell.samples) == 1:
            kept.put({"features": known[cell]}, *key(cell))
    return assembled(trace, samples, options, cells, [known[cell] for cell in cells])


def cells_of(
    trace: Trace, samples: Sequence[SampleRecord], options: Sequence[Option], device: str
) -> list[Cell]:
    """What is replayed at once, layer by layer of each group of samples."""
    together = _together(trace, samples, options, device)
    groups = [range(len(samples))[at : at + together] for at in range(0, len(samples), together)]
    return [Cell(group, layer) for group in groups for layer in range(trace.geometry.layers)]


def load_cell(
    trace: Trace,
    samples: Sequence[SampleRecord],
    cell: Cell,
    options: Sequence[Option],
    device: str,
) -> LayerReplay:
    """A cell's samples side by side, read by several threads."""
    ids = [samples[at].id for at in cell.samples]
    with ThreadPoolExecutor(min(_LOADERS, len(ids))) as loaders:
        each = loaders.map(lambda id_: load_layer(trace, id_, cell.layer, options, device), ids)
        return LayerReplay.side_by_side(list(each))


def load_layer(
    trace: Trace, sample: str, layer: int, options: Sequence[Option], device: str
) -> LayerReplay:
    """One layer of one sample, with what the options' methods read of other layers."""
    layers, names = trace.geometry.layers, replayed_tensors(trace)

    def signals(layer: int) -> Signals:
        return LayerReplay.of(trace.layer(sample, layer, device, names=_REPLAYED), device).signals

    replay = LayerReplay.of(trace.layer(sample, layer, device, names=names), device)
    return replace(replay, signals=linked(replay.signals, options, layers, signals))


def assembled(
    trace: Trace,
    samples: Sequence[SampleRecord],
    options: Sequence[Option],
    cells: Sequence[Cell],
    found: Sequence[Floats],
) -> Tables:
    """Tables of the features of every cell."""
    heads = trace.geometry.kv_heads
    rows: list[list[Floats]] = [[] for _ in samples]
    for cell, features in zip(cells, found, strict=True):
        for at, sample in enumerate(cell.samples):
            rows[sample].append(features[at * heads : (at + 1) * heads])
    factor = np.stack([np.concatenate(row) for row in rows])  # [n, I, O, S * C / block]
    first = samples[0]
    return Tables(
        model=str(trace.manifest["model"]["name"]),
        layers=trace.geometry.layers,
        kv_heads=trace.geometry.kv_heads,
        head_dim=trace.geometry.head_dim,
        prompt_tokens=first.prompt,
        options=tuple(options),
        samples=tuple(SampleFacts(s.id, s.split, s.kind) for s in samples),
        loss=(factor**2).sum(-1),
        factor=factor,
        group=np.arange(len(samples)),
    )


def replayed_tensors(trace: Trace) -> tuple[str, ...]:
    """Names of what replay reads of a layer."""
    return (*_REPLAYED, *tensors_of(trace.manifest["signals"]))


def _together(
    trace: Trace, samples: Sequence[SampleRecord], options: Sequence[Option], device: str
) -> int:
    """Samples whose heads are replayed side by side.

    A GPU is kept busy by many heads, and launches cost the same for one sample as for all of them;
    on a CPU one sample's scores fill the caches. Methods that look beyond a head take one sample.
    It follows from the card, and not from what is free of it, unless that is little.
    """
    sizes = {(sample.prompt, sample.observed) for sample in samples}
    methods = {option.method for option in options}
    alone = all(m.chooses_head_by_head and m.needs.by_head for m in methods)
    if not device.startswith("cuda") or len(sizes) > 1 or not alone:
        return 1
    prompt, observed = sizes.pop()
    kept = Counter(option.budget.resolve(prompt) for option in options)
    entries = max(tokens * count for tokens, count in kept.items())  # of the largest batch
    each = _COPIES * 4 * trace.geometry.query_heads * observed * entries
    free, total = (size * _SHARE_OF_MEMORY for size in torch.cuda.mem_get_info(device))
    room = min(total, _MOST_AT_ONCE)
    return max(1, int((room if room < 4 * free else free) // each))


def readers_for(device: str) -> int:
    """How many threads read layers: a GPU is done with one before a single thread has the next."""
    return 1 if device == "cpu" else _LOADERS


def replayed(
    load: Callable[[T], L], replay: Callable[[L], R], items: Iterable[T], device: str
) -> Iterator[R]:
    """What is replayed of each item, in order; a GPU has the next one loaded meanwhile.

    A CPU works on several at once, each with its own share of the threads: most operations are too
    small to be shared out among cores, which would wait for each other after every one.
    """
    if device != "cpu":
        yield from map(replay, ahead(load, items))
        return
    threads = torch.get_num_threads()
    workers = min(threads, _CELLS_AT_ONCE)
    try:
        yield from ahead(
            lambda item: replay(load(item)),
            items,
            workers,
            lambda: torch.set_num_threads(threads // workers),
        )
    finally:
        torch.set_num_threads(threads)  # workers set their own, and what later threads begin with


def ahead(
    load: Callable[[T], R],
    items: Iterable[T],
    readers: int = 1,
    begin: Callable[[], None] | None = None,
) -> Iterator[R]:
    """Load items in order, a few ahead of their use, so that reading and arithmetic overlap.

    Args:
        load: makes something of an item.
        items: what is loaded.
        readers: threads that load.
        begin: what each of them does first.
    """
    with ThreadPoolExecutor(readers, initializer=begin) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > readers + 1:
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
