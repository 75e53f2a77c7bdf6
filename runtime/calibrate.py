"""What CompressKV measures on a model once: heads that retrieve, layers that a tiny cache hurts.

``python -m kvtune.runtime.calibrate MODEL`` measures and keeps it; what needs it measures it when
it is missing. Needles are of the search split, so that nothing evaluated is calibrated on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtune.common.progress import Bars, Progress, Silent
from kvtune.policies.apply import apply_together
from kvtune.policies.methods.compresskv import CompressKV
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Needs
from kvtune.runtime.live import answer
from kvtune.runtime.prompts import Prompt, fresh_prompt
from kvtune.traces.calibration import Calibration, find_calibration, keep_calibration
from kvtune.traces.models import LoadedModel, best_device, load_model
from kvtune.traces.passes import run_observed
from kvtune.traces.samples import Sample
from kvtune.traces.seam import Handler
from kvtune.traces.workloads import Workload, build

WORKLOAD = Workload({"search": {"retrieval": 6}}, tokens=1024, observed=128)
TINY_BUDGET = 32


def calibration_of(loaded: LoadedModel, progress: Progress | None = None) -> Calibration:
    """The model's calibration; measured and kept if there is none."""
    found = find_calibration(loaded.fingerprint)
    if found is None:
        samples = build(WORKLOAD, loaded.tokenizer)
        found = replace(calibrate(loaded, samples, progress), source=WORKLOAD.describe())
        keep_calibration(loaded.fingerprint, found)
    return found


def calibrate(
    loaded: LoadedModel, samples: Sequence[Sample], progress: Progress | None = None
) -> Calibration:
    """Measure a model on needle samples.

    Args:
        loaded: the model.
        samples: with needles, whose answers stand in the observed part.
        progress: told of every sample.
    """
    geometry = loaded.geometry
    mass = torch.zeros(geometry.layers, geometry.query_heads)
    error = torch.zeros(geometry.layers)
    needs = Needs(window=CompressKV().window)
    prompts = [fresh_prompt(loaded, sample, needs) for sample in samples]
    pairs = list(zip(samples, prompts, strict=True))
    progress = progress or Silent()
    for sample, prompt in progress.track(pairs, "finding retrieval heads", len(pairs)):
        mass += _copied_mass(loaded, sample, prompt) / len(pairs)
    for sample, prompt in progress.track(pairs, "measuring layers", len(pairs)):
        error += _layer_errors(loaded, sample, prompt, mass) / len(pairs)
    return Calibration(
        tuple(tuple(row) for row in mass.tolist()), tuple(error.tolist()), f"{len(pairs)} samples"
    )


def _copied_mass(loaded: LoadedModel, sample: Sample, prompt: Prompt) -> Tensor:
    """Attention mass on the needle whose answer is being copied, ``[L, Hq]``.

    Summed over the whole needle, mean over the answer's tokens that the model gets right.
    """
    needle = needle_columns(sample).to(loaded.device)  # [C, P]
    paid: list[Tensor] = []

    def see(attention: Tensor) -> None:
        paid.append((attention[..., : sample.prompt] * needle).sum(-1))

    handler = watched(prompt, see)
    observed = sample.token_ids[sample.prompt :]
    with torch.no_grad():
        logits = run_observed(loaded, observed, sample.prompt, handler)[0]
    right = logits.argmax(-1).cpu() == torch.tensor(sample.targets)
    counted = right & torch.tensor(sample.answer_mask)
    rows: Tensor = torch.stack(paid).cpu()[..., counted]  # [L, Hq, rows]
    mean: Tensor = rows.sum(-1) / max(rows.shape[-1], 1)
    return mean


def watched(prompt: Prompt, see: Callable[[Tensor], None]) -> Handler:
    """Answers observed tokens from an uncompressed prompt; ``see`` gets each layer's attention.

    Args:
        prompt: of the sample that runs.
        see: given ``[Hq, C, N]`` float32, layer by layer.
    """

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        before = prompt(layer)
        heads = k.shape[1]
        queries = q[0].float().unflatten(0, (heads, -1)) * scale
        keys = torch.cat((before.keys, k[0].float()), 1)
        logits = queries @ keys[:, None].transpose(-1, -2)
        later = torch.ones(q.shape[2], q.shape[2], device=q.device).triu(1).bool()
        logits[..., before.prompt_tokens :].masked_fill_(later, -torch.inf)
        attention = logits.softmax(-1)
        see(attention.flatten(0, 1))
        values = torch.cat((before.values, v[0].float()), 1)
        output: Tensor = (attention @ values[:, None]).flatten(0, 1)[None].to(q.dtype)
        return output

    return handler


def needle_columns(sample: Sample) -> Tensor:
    """For each observed row, the prompt's tokens of the needle that it answers, ``[C, P]`` bool."""
    found = torch.zeros(sample.observed, sample.prompt)
    for needle in range(max(sample.needle_of_row) + 1):
        rows = [row for row, whose in enumerate(sample.needle_of_row) if whose == needle]
        if rows:
            first, last = _span(sample, rows)
            found[rows, first:last] = 1
    return found


def _span(sample: Sample, rows: Sequence[int]) -> tuple[int, int]:
    """Where a needle stands in the prompt: its answer's tokens, and back while both texts agree."""
    text = (*sample.token_ids, sample.next_token)
    asked = sample.prompt + rows[0] + 1  # the answer's first token where it is asked for
    answer_ids = text[asked : asked + len(rows)]
    for start in range(sample.prompt - len(rows) + 1):
        if text[start : start + len(rows)] == answer_ids:
            first = start
            while first and text[first - 1] == text[asked - (start - first) - 1]:
                first -= 1
            return first, start + len(rows)
    return 0, 0


def _layer_errors(loaded: LoadedModel, sample: Sample, prompt: Prompt, mass: Tensor) -> Tensor:
    """Relative error of each layer's attention output under a tiny cache, ``[L]``."""
    geometry = loaded.geometry
    tiny = Option(CompressKV(), Budget(tokens=TINY_BUDGET))
    policies = [
        Policy.uniform(option, geometry.layers, geometry.kv_heads) for option in (Option(), tiny)
    ]
    planned = [policy.budgets(sample.prompt).tolist() for policy in policies]
    budgets = list(zip(*planned, strict=True))  # [L][policies][H]
    errors: list[float] = []

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        signals = replace(prompt(layer), head_scores=mass[layer].to(q.device), _memo={})
        both = answer(q, k, v, apply_together(policies, layer, budgets[layer], signals), scale)
        full, ours = both.float()
        errors.append(float((ours - full).norm() / full.norm().clamp_min(1e-5)))
        return both[:1]

    with torch.no_grad():
        run_observed(loaded, sample.token_ids[sample.prompt :], sample.prompt, handler)
    return torch.tensor(errors)


def summary(found: Calibration) -> str:
    """One line a layer: its error and the heads that would vote."""
    rows = []
    for layer, scores in enumerate(found.head_scores):
        best = sorted(range(len(scores)), key=lambda head: -scores[head])[: CompressKV().voters]
        voters = ", ".join(f"{head} ({scores[head]:.2f})" for head in best)
        rows.append(f"layer {layer}: error {found.layer_errors[layer]:.3f}, heads {voters}")
    return "\n".join(rows)


if __name__ == "__main__":
    model = load_model(sys.argv[1], device=best_device())
    print(summary(calibration_of(model, Bars())))
