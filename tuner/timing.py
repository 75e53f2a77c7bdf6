"""Times on this machine's GPU beside those that were predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.policy import Policy
from kvtune.profiles.gpus import GpuProfile, detect_gpu
from kvtune.profiles.shape import ModelShape
from kvtune.runtime.timing import (
    STEPS,
    STRETCHES,
    Bench,
    Beside,
    bench_for,
    time_beside,
    uncompressed,
)  # fmt: skip
from kvtune.simulator.cost import cache_bytes_by_bits, per_second
from kvtune.simulator.latency import decode_step, prefill
from kvtune.traces.models import LoadedModel
from kvtune.traces.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Predicted:
    """What the simulator says of one policy on the card, for the batch that was timed.

    Args:
        prefill: of the whole batch, seconds.
        step: one decode step, seconds.
        tokens_per_second: of all sequences together.
    """

    prefill: Estimate
    step: Estimate
    tokens_per_second: Estimate


@dataclass(frozen=True)
class Times:
    """Times and memory of a plan on this machine's GPU.

    Args:
        gpu: slug of its profile; None for a card without one, of which nothing is predicted.
        measured: the plan and the uncompressed cache, in the same run.
        plan: predicted, or None.
        full_cache: predicted, or None.
        alone: predicted, or None.
    """

    gpu: str | None
    measured: Beside
    plan: Predicted | None
    full_cache: Predicted | None
    alone: Predicted | None

    def as_dict(self) -> dict[str, object]:
        """The form that goes into JSON."""
        found = self.measured
        return {
            "gpu": self.gpu,
            "context_tokens": found.prompt_tokens,
            "plan": found.plan,
            "full_cache": found.full_cache,
            "alone": found.alone,
            "ratios": found.ratios,
            "predicted": {
                "plan": self.plan,
                "full_cache": self.full_cache,
                "alone": self.alone,
            },
        }


def time_plan(
    policy: Policy,
    loaded: LoadedModel,
    shape: ModelShape,
    samples: Sequence[Sample],
    *,
    batch: int = 1,
    context_tokens: int | None = None,
    bench_of: Callable[[str], Bench] = bench_for,
) -> Times:
    """Run a policy and the uncompressed cache in the paged runtime, and predict both.

    Args:
        policy: for the model's shape.
        loaded: the model, on the GPU.
        shape: the same model, as the simulator knows it.
        samples: whose texts the prompts are made of.
        batch: sequences at once, halved until they fit.
        context_tokens: of each prompt; None for a sample's own.
        bench_of: gives a device's bench.

    Raises:
        KvtuneError: no GPU, or a policy that the paged runtime cannot store; it says which.
    """
    bench = bench_of(loaded.device)
    tokens = min(context_tokens or samples[0].prompt, loaded.geometry.max_context)
    measured = time_beside(policy, loaded.model, _prompts(loaded, samples, batch, tokens), bench)
    gpu = _known_gpu()
    batches = {
        "plan": (policy, measured.plan.batch),
        "full_cache": (uncompressed(policy), measured.full_cache.batch),
        "alone": (policy, measured.alone.batch if measured.alone else 0),
    }
    if gpu is None or not _known(shape, loaded):
        predicted: dict[str, Predicted | None] = dict.fromkeys(batches)
    else:
        predicted = {
            name: _predict(one, shape, gpu, many, tokens) if many else None
            for name, (one, many) in batches.items()
        }
    return Times(gpu.slug if gpu else None, measured, **predicted)


def _prompts(loaded: LoadedModel, samples: Sequence[Sample], batch: int, tokens: int) -> Tensor:
    """``[B, P]`` token ids: the samples' texts one after another, begun at another each time."""
    import torch

    rows = []
    for row in range(batch):
        at = row % len(samples)
        text = [token for sample in (*samples[at:], *samples[:at]) for token in sample.token_ids]
        rows.append((text * -(-tokens // len(text)))[:tokens])
    return torch.tensor(rows, device=loaded.device)


def _known_gpu() -> GpuProfile | None:
    try:
        return detect_gpu()
    except KvtuneError:  # a card without a profile
        return None


def _known(shape: ModelShape, loaded: LoadedModel) -> bool:
    """Whether the simulator answers for such a model."""
    return loaded.dtype != "float32" and shape.latent is None and not any(shape.windows)


def _predict(
    policy: Policy, shape: ModelShape, gpu: GpuProfile, batch: int, tokens: int
) -> Predicted:
    """The simulator's answer in the middle of the timed steps."""
    held = cache_bytes_by_bits(policy, shape, tokens)
    held[16.0] += shape.kv_bytes(STEPS * (1 + STRETCHES // 2))
    step = decode_step(shape, gpu, "bf16", batch, dict(held))
    return Predicted(
        prefill=prefill(shape, gpu, "bf16", tokens, batch),
        step=step,
        tokens_per_second=per_second(step, batch),
    )
