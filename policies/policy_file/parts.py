"""What a policy file says: the policy, its model, where it comes from, how to serve it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy, label_of

VERSION = 2
"""The newest that is read. A file has it where a budget has a floor, which version 1 did not know:
an older kvtune then says that it must be updated, not that the budget is wrong."""
WITHOUT_FLOORS = 1
"""Of all other files, which every kvtune reads."""
_ROOTED = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\)")


def portable(value: Any) -> Any:
    """``value`` with the folders taken off texts that are paths of this machine."""
    if isinstance(value, str) and _ROOTED.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    return [portable(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class _Portable:
    """Fields of a policy file hold no path of the machine that wrote it."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, (str, dict)):
                object.__setattr__(self, each.name, portable(value))


@dataclass(frozen=True)
class ModelFacts(_Portable):
    """The model that a policy is for.

    Args:
        name: a known name, or the last part of a path.
        layers: L.
        kv_heads: H.
        head_dim: D.
        max_context: tokens that it takes, prompt and answer together.
        hub: its id on the Hugging Face Hub, which serving stacks load it by; "" where not known.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    max_context: int | None = None
    hub: str = ""


@dataclass(frozen=True)
class Quality(_Portable):
    """What the policy was predicted, or measured, to lose.

    Args:
        source: whether the model's own trace was used.
        stand_in: the model whose trace stood in; empty with the model's own.
        kl_nats_per_token: KL divergence from the full cache, with its interval and tier.
        stack: where that was measured as a stack runs plans that also stores answers; or "".
        edited: whether the file was edited since; nothing is then known of its loss. Not written.
    """

    source: Literal["own trace", "stand-in"]
    stand_in: str = ""
    kl_nats_per_token: Estimate | None = None
    stack: str = ""
    edited: bool = False

    def __str__(self) -> str:
        """``stand-in (smollm2-135m)``, ``own trace``, or that the file was edited."""
        if self.edited:
            return "edited since it was searched: its loss is not known"
        return f"stand-in ({self.stand_in})" if self.source == "stand-in" else self.source


@dataclass(frozen=True)
class Provenance(_Portable):
    """Where a policy comes from.

    Args:
        quality: what it loses, by whose trace.
        kvtune: version that wrote it.
        trace: hash of the trace or tables.
        seed: of the search.
        memory: figures as plain data, ``Estimate.as_dict`` each.
        latency: likewise.
        other_lengths: loss on prompts of other lengths than ``quality`` was measured on, likewise,
            by prompt tokens.
    """

    quality: Quality | None = None
    kvtune: str = ""
    trace: str = ""
    seed: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    other_lengths: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Serving(_Portable):
    """What the policy was planned for.

    Args:
        weights: format of the weights, for example ``bf16`` or ``q4_0``.
        context_tokens: of each prompt.
        generated_tokens: that each sequence has room for beside its prompt.
        batch: sequences at once.
        gpu: name of the GPU profile.
        cache_bytes: that the memory limit leaves for the caches of all sequences together.
    """

    weights: str = ""
    context_tokens: int | None = None
    generated_tokens: int | None = None
    batch: int | None = None
    gpu: str = ""
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Pattern:
    """A policy that is not yet bound to a model's shape: one option everywhere, with exceptions.

    Args:
        option: for every head of every layer not named in ``layers``.
        layers: exceptions, (layer, options) in ascending order; one option is for all its heads.
        allocator: re-splits the budgets.
        name: for tables and plots; the option's label where empty.
    """

    option: Option
    layers: tuple[tuple[int, tuple[Option, ...]], ...] = ()
    allocator: Allocator = AsGiven()
    name: str = ""

    def check_allocator(self) -> None:
        """Refuse an allocator that cannot split budgets between the heads' methods."""
        exceptions = [options for _, options in self.layers]
        rows = [(self.option,), *exceptions]
        self.allocator.check([[option.method for option in row] for row in rows])

    def bind(self, layers: int, kv_heads: int) -> Policy:
        """The policy for a model's shape.

        Raises:
            KvtuneError: an exception names a layer or a number of heads that the model lacks.
        """
        rows = [(self.option,) * kv_heads for _ in range(layers)]
        for layer, options in self.layers:
            if layer >= layers:
                raise KvtuneError(f"the policy names layer {layer}, the model has {layers}")
            if len(options) not in (1, kv_heads):
                raise KvtuneError(
                    f"layer {layer} of the policy has {len(options)} options, "
                    f"the model has {kv_heads} KV heads"
                )
            rows[layer] = options * kv_heads if len(options) == 1 else options
        name = self.name or label_of(self.option, self.allocator)
        return Policy(name, tuple(rows), self.allocator)


@dataclass(frozen=True)
class PolicyDocument:
    """Everything in a policy file.

    Args:
        policy: bound to a shape, or a pattern that any shape can take.
        model: what it was made for, where known.
        provenance: where it comes from, where known.
        serving: what it was planned for, where known.
    """

    policy: Policy | Pattern
    model: ModelFacts | None = None
    provenance: Provenance | None = None
    serving: Serving | None = None

    def bind(self, layers: int, kv_heads: int) -> Policy:
        """The policy for a model's shape.

        Raises:
            KvtuneError: it was made for another shape.
        """
        if isinstance(self.policy, Pattern):
            return self.policy.bind(layers, kv_heads)
        self.policy.check_fits(layers, kv_heads)
        return self.policy

    @property
    def stand_in(self) -> str:
        """The model whose trace stood in for this one's; empty if none did."""
        quality = self.provenance.quality if self.provenance else None
        return quality.stand_in or "unnamed" if quality and quality.source == "stand-in" else ""
