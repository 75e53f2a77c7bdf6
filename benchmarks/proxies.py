"""The usual stand-ins for quality, to be held against: attention mass lost, output error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvtune.policies.kept import Kept, ask
from kvtune.policies.policy import Policy
from kvtune.policies.storage import store
from kvtune.simulator.quality.build import DEFAULT_BLOCK, ahead
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.trace import SampleRecord, Trace

_TOGETHER = 14


@torch.no_grad()
def predictions(
    trace: Trace, samples: Sequence[SampleRecord], policies: Sequence[Policy], device: str
) -> dict[str, np.ndarray]:
    """Three predictions of every policy on every sample, ``[policies, samples]`` each.

    probes: KL in nats/token. mass: attention mass on evicted tokens, mean over heads. error:
    relative error of the attention output, mean over heads and positions.
    """
    shape = (len(policies), len(samples))
    found = {name: np.zeros(shape) for name in ("probes", "mass", "error")}
    for column, sample in enumerate(samples):
        budgets = [policy.budgets(sample.prompt) for policy in policies]
        blocks = sample.observed // DEFAULT_BLOCK
        totals = torch.zeros(len(policies), trace.probes, blocks, device=device)

        def load(index: int, sample: SampleRecord = sample) -> LayerReplay:
            return LayerReplay.of(trace.layer(sample.id, index, device), device)

        layers = trace.geometry.layers
        for index, layer in enumerate(ahead(load, range(layers))):
            mass = _attention(layer)
            for at in range(0, len(policies), _TOGETHER):
                some = slice(at, at + _TOGETHER)
                rows = [policy.heads[index] for policy in policies[some]]
                tokens = [
                    policy.split(index, planned[index].tolist(), layer.signals)
                    for policy, planned in zip(policies[some], budgets[some], strict=True)
                ]
                kept = ask(rows, tokens, layer.signals)
                part = store(rows, tokens, kept, layer.signals)
                totals[some] += layer.response(part, DEFAULT_BLOCK).sum(1)
                change = (layer.output(part) - layer.full).norm(dim=-1) / layer.full.norm(dim=-1)
                found["error"][some, column] += change.mean((1, 2, 3)).cpu().numpy() / layers
                found["mass"][some, column] += (1 - _mass_kept(mass, kept)).cpu().numpy() / layers
        scale = 2 * sample.observed * layer.probes.shape[0]
        found["probes"][:, column] = (totals**2).sum((1, 2)).cpu().numpy() / scale
    return found


def _attention(layer: LayerReplay) -> Tensor:
    """Share of the prompt's attention that each token draws from observed queries, ``[H, P]``."""
    logits = layer.queries @ layer.signals.keys[:, None].transpose(-1, -2) * layer.signals.scale
    mass = logits.softmax(-1).mean((1, 2))
    return mass / mass.sum(-1, keepdim=True)


def _mass_kept(mass: Tensor, kept: Kept) -> Tensor:
    """Mean over heads, ``[B]``."""
    each = [mass[row % len(mass), tokens].sum() for row, tokens in enumerate(kept.tokens)]
    return torch.stack(each).view(-1, len(mass)).mean(-1)
