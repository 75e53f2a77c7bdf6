"""Mixed policies run live and predicted head by head: what ways to rank them are compared on.

A record holds, of one text, the live loss of every policy at every observed position, and how the
probes respond there to what each head does, so that any way to put heads together can be tried
afterwards (``ranking_refined.py`` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from predictions import most_lost
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtune.policies.apply import apply_together
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import full_cache, run_live
from kvtune.runtime.prompts import Prompt, fresh_prompt
from kvtune.simulator.quality.replay import LayerReplay
from kvtune.traces.models import LoadedModel
from kvtune.traces.probes import Probes
from kvtune.traces.samples import Sample
from kvtune.tuner.solver import evicts
from kvtune.tuner.validate import union_of_needs

ROWS = 14  # policies a batch
GROUPS = ("quantising", "evicting")


@dataclass(frozen=True)
class Record:
    """One text; B policies, I heads of all layers, S probes, C observed positions.

    Args:
        live: loss of each policy, ``[B, C]`` nats.
        most: what is lost with hardly anything of the prompt left, ``[C]`` nats.
        answers: whether a position's target is an answer, ``[C]``.
        responses: of the probes to each head's option, ``[B, I, S, C]``, in 16 bits.
    """

    live: Tensor
    most: Tensor
    answers: Tensor
    responses: Tensor

    def save(self, path: Path) -> None:
        """Write it to a file."""
        save_file(
            {each.name: getattr(self, each.name).cpu().contiguous() for each in fields(self)}, path
        )

    @staticmethod
    def load(path: Path) -> Record:
        """The record that ``save`` wrote."""
        with safe_open(path, "pt") as file:
            return Record(**{each.name: file.get_tensor(each.name) for each in fields(Record)})


def groups_of(policies: Sequence[Policy]) -> Tensor:
    """Which of ``GROUPS`` the option of every head belongs to, ``[B, I]``."""
    rows = [[evicts(o) for layer in policy.heads for o in layer] for policy in policies]
    return torch.tensor(rows).long()


@torch.no_grad()
def record(
    loaded: LoadedModel, sample: Sample, policies: Sequence[Policy], probes: Probes
) -> Record:
    """Run and replay all policies on one text."""
    needs = union_of_needs(policies) | Needs(future=True, probes=True)
    prompt = fresh_prompt(loaded, sample, needs, probes=probes)
    full = full_cache(loaded, sample, prompt)
    live, responses = [], []
    for at in range(0, len(policies), ROWS):
        some = policies[at : at + ROWS]
        live += [run.kl for run in run_live(loaded, sample, prompt, some, full)]
        responses.append(_responses(prompt, sample, some))
    return Record(
        torch.from_numpy(np.stack(live)),
        most_lost(loaded, sample, prompt, full),
        torch.tensor(sample.answer_mask),
        torch.cat(responses),
    )


def _responses(prompt: Prompt, sample: Sample, policies: Sequence[Policy]) -> Tensor:
    """Of a few policies, ``[B, I, S, C]``."""
    budgets = [policy.settle(sample.prompt, prompt) for policy in policies]
    layers = []
    for layer in range(policies[0].layers):
        replay = LayerReplay.of_signals(prompt(layer))
        planned = [budget[layer].tolist() for budget in budgets]
        part = apply_together(policies, layer, planned, replay.signals)
        layers.append(replay.response(part, 1).half())
    return torch.cat(layers, 1)
