"""One policy replayed on the samples of a trace, and whose quality that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.progress import Progress
from kvtune.policies.policy import Policy
from kvtune.simulator.quality.evaluate import replay_policies
from kvtune.traces.models import stored_fingerprint
from kvtune.traces.trace import SampleRecord, Trace
from kvtune.tuner.quality import estimate
from kvtune.tuner.target import Target


@dataclass(frozen=True)
class Replayed:
    """A replay's figures.

    Args:
        samples: that were replayed.
        kl: of each, nats/token.
        estimate: mean over kinds with its interval over samples, tier replay.
        trace: folder.
        model: whose trace it is.
        sha256: of the trace.
        stand_in: the traced model, if it is another than the policy's; else empty.
    """

    samples: tuple[SampleRecord, ...]
    kl: tuple[float, ...]
    estimate: Estimate
    trace: str
    model: str
    sha256: str
    stand_in: str

    @property
    def quality(self) -> str:
        """``own trace`` or ``stand-in (smollm2-135m)``."""
        return f"stand-in ({self.stand_in})" if self.stand_in else "own trace"

    def as_dict(self) -> dict[str, Any]:
        """The form that goes into JSON."""
        return {
            "kl_nats_per_token": self.estimate.value,
            "interval": [self.estimate.low, self.estimate.high],
            "tier": self.estimate.tier,
            "source": "stand-in" if self.stand_in else "own trace",
            "stand_in": self.stand_in or None,
            "samples": [
                {"id": sample.id, "split": sample.split, "kind": sample.kind, "kl": loss}
                for sample, loss in zip(self.samples, self.kl, strict=True)
            ],
        }


def replay(
    trace: Trace, policy: Policy, target: Target, split: str, device: str, progress: Progress
) -> Replayed:
    """Replay a policy on one split, or all samples.

    Raises:
        KvtuneError: the trace is of another model, damaged, or has no such samples.
    """
    samples = trace.samples if split == "all" else trace.of_split(split)
    if not samples:
        raise KvtuneError(
            f"the trace has no {split!r} samples", where=str(trace.root), hint="try --split all."
        )
    _check_shape(trace, policy)
    _check_weights(trace, Path(target.model))
    losses = replay_policies(trace, samples, [policy], device=device, progress=progress)[0]
    traced = str(trace.manifest["model"]["name"])
    return Replayed(
        samples=samples,
        kl=tuple(map(float, losses)),
        estimate=estimate(losses, [sample.kind for sample in samples], "replay"),
        trace=str(trace.root),
        model=traced,
        sha256=trace.content_sha256,
        stand_in="" if _last(traced) == _last(target.shape.name) else _last(traced),
    )


def _check_shape(trace: Trace, policy: Policy) -> None:
    traced, wanted = trace.geometry, (policy.layers, policy.kv_heads)
    if (traced.layers, traced.kv_heads) != wanted:
        raise KvtuneError(
            f"the trace is of another model ({trace.manifest['model']['name']}: {traced.layers} "
            f"layers of {traced.kv_heads} KV heads; the policy: {wanted[0]} of {wanted[1]})",
            where=str(trace.root),
            hint="capture a trace of the policy's model.",
        )


def _check_weights(trace: Trace, model: Path) -> None:
    """Refuse another model's trace where the model's weights lie here; a name alone may differ.

    Nothing is fetched for it: of a model whose shape alone is known, a trace may stand in.
    """
    if model.is_file() or any(model.glob("*.safetensors")):
        trace.require_model(stored_fingerprint(model))


def _last(name: str) -> str:
    """The last part of a path or Hub id, without case and ending."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
