"""MiniCache: neighbouring layers share the directions of their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.gathering import of_tokens, other_tokens
from kvtune.policies.method import Method
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 1e-6  # of a sine below which two directions are one


@dataclass(frozen=True)
class MiniCache(Method):
    """Two layers store one direction a token and head between them, and a length each.

    pairs     = an even layer and the next one, or with ``first: 1`` an odd layer and the next one
    e         = slerp(k[l] / |k[l]|, k[l + 1] / |k[l + 1]|, ``position``); likewise for values
    k'[l]     = |k[l]| * e
    retained  = the budget's tokens, whose two keys differ most in direction, as they are

    Source: Liu et al., "MiniCache: KV Cache Compression in Depth Dimension for Large Language
    Models", NeurIPS 2024, arXiv 2405.14366; position 0.6 is the paper's, which merges the deeper
    half of the layers: a policy gives ``full`` to the others, and this method to both layers of a
    pair. Read literally its rule retains the pairs that are most alike; what it says it means, and
    what ``retention: distinct`` does, is to retain the most distinct ones. A budget fixes their
    number (the paper's gamma of 5 % is a range of angles). The first token is always retained.
    Cost: O(H P D) once a pair of layers; the whole cache is held until both have been read.
    """

    name = "minicache"
    source = "Liu et al., NeurIPS 2024, arXiv 2405.14366"

    position: float = parameter(0.6, "where between the two directions theirs lies", low=0, high=1)
    first: int = parameter(0, "0 where even layers begin pairs, 1 where odd ones do", low=0, high=1)
    retention: Literal["distinct", "alike"] = parameter(
        "distinct", "which pairs of keys are retained: the most distinct, or the most alike"
    )

    @property
    def needs(self) -> Needs:
        """The other layer's keys and values."""
        return Needs(linked=True)

    def linked_layer(self, layer: int, layers: int) -> int | None:
        """The other layer of the pair."""
        return layer - 1 if self._is_second(layer) else layer + 1

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The tokens that keep their own keys and values."""
        import torch

        other, _ = signals.given("linked")
        cosine = torch.cosine_similarity(signals.keys.float(), other.float(), dim=-1)
        worth = -cosine if self.retention == "distinct" else cosine
        worth[:, :1] = torch.inf
        best = worth.argsort(dim=-1, descending=True, stable=True)[:, :budget]
        return best.sort(-1).values

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """Retained tokens, and the others with directions between two layers' own."""
        retained = self.keep(signals, budget)
        if retained.shape[1] == signals.prompt_tokens:
            return [Part(retained)]
        merged = other_tokens(retained, signals.prompt_tokens)
        both = signals.keys, signals.values
        of_keys, of_values = (
            self._between(of_tokens(own, merged), of_tokens(other, merged), signals.layer)
            for own, other in zip(both, signals.given("linked"), strict=True)
        )
        shared = Part(merged, of_keys, of_values, shared_by=2)
        return [Part(retained), shared] if retained.shape[1] else [shared]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """Retained tokens, and the others at half of their directions' bytes."""
        retained = min(budget, prompt_tokens)
        if retained == prompt_tokens:
            return (PartPlan(retained),)
        shared = PartPlan(prompt_tokens - retained, shared_by=2)
        return (PartPlan(retained), shared) if retained else (shared,)

    def _is_second(self, layer: int) -> bool:
        return layer % 2 != self.first

    def _between(self, own: Tensor, other: Tensor, layer: int) -> Tensor:
        """A layer's own lengths along directions between the two layers'."""
        mine, theirs = own.float(), other.float()
        first, second = (theirs, mine) if self._is_second(layer) else (mine, theirs)
        direction = _slerp(first, second, self.position)
        between: Tensor = mine.norm(dim=-1, keepdim=True) * direction
        return between.to(own.dtype)


def _slerp(first: Tensor, second: Tensor, position: float) -> Tensor:
    """Unit vectors on the arc from ``first`` to ``second``, ``[..., D]`` each."""
    import torch
    import torch.nn.functional as F

    one, two = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    angle = (one * two).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    is_parallel = sine < _PARALLEL
    safe = sine.masked_fill(is_parallel, 1)
    from_one = torch.where(is_parallel, 1 - position, ((1 - position) * angle).sin() / safe)
    from_two = torch.where(is_parallel, position, (position * angle).sin() / safe)
    direction: Tensor = F.normalize(from_one * one + from_two * two, dim=-1)
    return direction
