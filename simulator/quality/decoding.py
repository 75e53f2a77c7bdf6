"""Tables for long generations: options that go on evicting, replayed over long observed parts.

A trace's observed tokens count as generated. They are stepped through the same cache of slots that
a live generation steps, with the queries of the full run (open loop), and what that changes in the
attention output is multiplied with the probes, as for a prompt. All layers of a sample step side by
side, as heads of one: thousands of short steps cost what they launch, not what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvtune.common.captured_steps import Steps
from kvtune.common.progress import Progress, Silent
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.option import Option
from kvtune.policies.room import goes_on_evicting
from kvtune.policies.slot_prompt import prompt_of
from kvtune.policies.slots import SlotCache
from kvtune.simulator.quality.build import DEFAULT_BLOCK
from kvtune.simulator.quality.replay import LayerReplay, in_blocks
from kvtune.simulator.quality.tables import Floats, SampleFacts, Tables
from kvtune.traces.signals import tensors_of
from kvtune.traces.trace import SampleRecord, Trace

_REPLAYED = ("q", "k", "v", "probes")
_ENTRIES = 2**22  # of all heads and budgets that step side by side


def build_decode_tables(
    trace: Trace,
    options: Sequence[Option],
    *,
    residual: int = 0,
    block: int = DEFAULT_BLOCK,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tables:
    """Tables of a trace's samples for a generation of as many tokens as were observed.

    Args:
        trace: captured with probes.
        options: of methods whose heads choose alone, in formats that store each token apart.
        residual: newest generated tokens that stay in 16 bits.
        block: positions whose responses are summed before squaring.
        device: where the arithmetic runs.
        progress: told of every sample.
    """
    geometry, samples = trace.geometry, trace.samples
    factor = np.stack(
        [
            decode_features(all_layers(trace, sample, device), options, residual, block)
            for sample in (progress or Silent()).track(samples, "replaying", len(samples))
        ]
    )
    return Tables(
        model=str(trace.manifest["model"]["name"]),
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        prompt_tokens=samples[0].prompt,
        options=tuple(options),
        samples=tuple(SampleFacts(s.id, s.split, s.kind) for s in samples),
        loss=(factor**2).sum(-1),
        factor=factor,
        group=np.arange(len(samples)),
    )


def all_layers(trace: Trace, sample: SampleRecord, device: str) -> LayerReplay:
    """A sample's layers as one layer that has all their heads."""
    names = (*_REPLAYED, *tensors_of(trace.manifest["signals"]))
    layers = [
        trace.layer(sample.id, layer, device, names=names) for layer in range(trace.geometry.layers)
    ]
    axis = {"probes": 2}  # [S, C, Hq, D]; of all others heads come first
    joined = {
        name: torch.cat([layer.tensors[name] for layer in layers], axis.get(name, 0))
        for name in layers[0].tensors
    }
    return LayerReplay.of(replace(layers[0], tensors=joined), device)


@torch.no_grad()
def decode_features(
    layer: LayerReplay, options: Sequence[Option], residual: int, block: int
) -> Floats:
    """Block-summed responses, ``[H, O, S * C / block]``, square root of nats/token."""
    responses: dict[int, Tensor] = {}
    for columns in _side_by_side(options, layer):
        change = outputs(layer, [options[column] for column in columns], residual) - layer.full
        by_position = torch.einsum("bhgtd,sthgd->bhst", change, layer.probes)
        responses.update(zip(columns, in_blocks(by_position, block), strict=True))
    stacked = torch.stack([responses[column] for column in range(len(options))], 1)
    probes, observed = layer.probes.shape[:2]
    features: Floats = (stacked.flatten(2) / (2 * observed * probes) ** 0.5).cpu().numpy()
    return features


def _side_by_side(options: Sequence[Option], layer: LayerReplay) -> Iterator[list[int]]:
    """Columns that step together: of one method and format, no more than memory is meant to take.

    Smaller budgets first, so that caches of much the same size share a batch.
    """
    longest = layer.signals.prompt_tokens + layer.keys.shape[1]
    kinds: dict[object, list[int]] = {}
    for column, option in enumerate(options):
        kind = option.method, option.keys, option.values, goes_on_evicting(option)
        kinds.setdefault(kind, []).append(column)
    for columns in kinds.values():
        batch: list[int] = []
        for column in sorted(columns, key=lambda c: options[c].budget.tokens or longest):
            slots = min(options[column].budget.tokens or longest, longest)
            if batch and (len(batch) + 1) * slots * len(layer.keys) > _ENTRIES:
                yield batch
                batch = []
            batch.append(column)
        yield batch


def outputs(layer: LayerReplay, options: Sequence[Option], residual: int) -> Tensor:
    """Attention output at the observed positions under options of one kind, ``[B, H, G, C, D]``."""
    prompt, (heads, observed) = layer.signals.prompt_tokens, layer.keys.shape[:2]
    budgets = np.array([[option.budget.tokens or prompt] * heads for option in options])
    first = options[0]
    method = first.method
    evicts = isinstance(method, DecodeMethod) and goes_on_evicting(first)
    forms = first.keys, first.values
    held = prompt_of(method, layer.signals, budgets.clip(max=prompt), evicts=evicts, forms=forms)
    cache = SlotCache(
        method if evicts else None,  # type: ignore[arg-type]
        held,
        layer.signals,
        budgets,
        observed,
        forms=forms,
        residual=residual,
    )
    return _Stepped(layer, cache).run()


class _Stepped:
    """A cache of slots that is stepped through the observed tokens.

    The device counts the tokens itself, so that a step may be replayed as a graph.
    """

    def __init__(self, layer: LayerReplay, cache: SlotCache) -> None:
        rows, (heads, group, observed, head_dim) = len(cache.sizes), layer.queries.shape
        self.layer, self.cache, self.observed = layer, cache, observed
        self.at = torch.zeros(1, dtype=torch.int64, device=layer.keys.device)
        self.outputs = layer.queries.new_empty(rows, heads, group, observed, head_dim)

    def run(self) -> Tensor:
        """Attention outputs at all observed positions, ``[B, H, G, C, D]``."""
        method = self.cache.method
        by_host = method is not None and method.reads_step_number
        steps = Steps(self.step, captures=self.at.is_cuda and not by_host)
        for _ in range(self.observed):
            self.cache.prepare()
            steps.run(self.cache.pattern)
            self.cache.count()
        return self.outputs

    def step(self) -> None:
        """The next token, which all rows of the cache read."""
        layer, rows = self.layer, len(self.outputs)
        query = layer.queries.index_select(2, self.at)[:, :, 0]
        key, value = (x.index_select(1, self.at)[:, 0] for x in (layer.keys, layer.values))
        found = self.cache.attend(*(x.expand(rows, *x.shape) for x in (query, key, value)))
        self.outputs.index_copy_(3, self.at, found[:, :, :, None])
        self.at += 1
