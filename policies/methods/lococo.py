"""LoCoCo: heavy hitters stay, and a small convolution fuses all others into a few entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.common.errors import KvtuneError
from kvtune.policies.gathering import of_tokens, other_tokens
from kvtune.policies.method import ScoredMethod
from kvtune.policies.parts import VIRTUAL, Part, PartPlan
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor

_WIDTH = 21  # tokens that a kernel spans, where the cost is told before any kernel is read


@dataclass(frozen=True)
class LoCoCo(ScoredMethod):
    """Part of the budget is tokens as they are, ``slots`` entries are weighted sums of the rest.

    h[j]   = attention that the last ``window`` queries pay to key j, summed over the head's group
    heavy  = the budget less ``slots`` tokens of highest h, as they are
    W_conv = softmax over the other tokens of relu(conv1d([k; v])), ``slots`` rows; one convolution
             a layer, all heads alike
    W_res  = one-hot rows of the ``slots`` other tokens of highest h
    k', v' = W k, W v with W = (1 - a) W_res + a W_conv

    Source: Cai et al., "LoCoCo: Dropping In Convolutions for Long Context Compression", ICML 2024,
    arXiv 2406.05317, and its released code. Differs: the prompt is fused once, when it is complete,
    not segment by segment (a fused entry is never fused again); h is summed over a group's heads;
    the model's own weights are never trained. ``python -m kvtune.runtime.learn MODEL lococo``
    trains the kernels and a by matching the attention of tokens to come, layer by layer. With
    ``fused: heaviest`` there are none and a is 0: the tokens of highest h stay, which is what the
    others must beat.
    Cost: O(Hq W P D), and 2 * 21 * 2 D * slots a token and head once a prompt; no state.
    """

    name = "lococo"
    source = "Cai et al., ICML 2024, arXiv 2406.05317"

    fused: Literal["heaviest", "convolution"] = parameter(
        "heaviest", "what the fused entries hold: single tokens, or sums by trained kernels"
    )
    slots: int = parameter(16, "fused entries", low=1, high=4096)
    window: int = parameter(
        128, "queries whose attention counts", unit="tokens", low=1, high=LONGEST_PROMPT
    )

    @property
    def needs(self) -> Needs:
        """The newest queries, and the kernels where they are used."""
        return Needs(window=self.window, learned=self.fused == "convolution")

    def scores(self, signals: Signals) -> Tensor:
        """Attention that the last queries pay."""
        return signals.window_attention(self.window).sum((1, 2))

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """Heavy hitters, and the fused entries where there are any."""
        if not self._fuses(budget, signals.prompt_tokens):
            return [Part(self.keep(signals, budget))]
        heavy = self.keep(signals, budget - self.slots)
        kernels = self._kernels(signals)
        keys, values = fused(
            signals.keys, signals.values, heavy, self.residual(signals, budget), kernels
        )
        virtual = heavy.new_full((heavy.shape[0], self.slots), VIRTUAL)
        sums = Part(virtual, keys.to(signals.keys.dtype), values.to(signals.values.dtype))
        return [Part(heavy), sums] if heavy.shape[1] else [sums]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """As many entries as the budget."""
        if not self._fuses(budget, prompt_tokens):
            return (PartPlan(min(budget, prompt_tokens)),)
        sums = PartPlan(self.slots)
        return (PartPlan(budget - self.slots), sums) if budget > self.slots else (sums,)

    def _fuses(self, budget: int, prompt_tokens: int) -> bool:
        return self.fused == "convolution" and self.slots <= budget < prompt_tokens

    def _kernels(self, signals: Signals) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, share = (
            signals.matrices(f"lococo_{name}") for name in ("weight", "bias", "share")
        )
        if len(weight) != self.slots:
            raise KvtuneError(
                f"the model's kernels fuse into {len(weight)} entries, slots is {self.slots}",
                hint="set slots to that, or fit kernels anew.",
            )
        return weight, bias, share

    def residual(self, signals: Signals, budget: int) -> Tensor:
        """The ``slots`` tokens of highest h behind the heavy hitters, in order: ``[H, slots]``."""
        ranked = self._best_first(signals, budget)[:, budget - self.slots : budget]
        return ranked.sort(-1).values

    def work(self, shape: LayerShape, budget: int) -> Work:
        """Attention of the window, and the convolution."""
        cells = float(shape.kv_heads * shape.prompt_tokens * self.slots)
        flops = 4.0 * _WIDTH * shape.head_dim * cells + 4.0 * shape.head_dim * cells
        convolved = Work(flops, 8.0 * cells, launches=12) if self.needs.learned else Work()
        return super().work(shape, budget) + convolved


def fused(
    keys: Tensor,
    values: Tensor,
    heavy: Tensor,
    residual: Tensor,
    kernels: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[H, slots, D]`` of the fused entries; differentiable by the kernels.

    Args:
        keys: ``[H, P, D]``.
        values: likewise.
        heavy: tokens that stay as they are, ``[H, n]``.
        residual: tokens that an entry holds besides, ``[H, slots]``.
        kernels: weight ``[slots, 2 D, width]``, bias ``[slots]``, share of the convolution ``[]``.
    """
    import torch
    import torch.nn.functional as F

    weight, bias, share = kernels
    tokens = keys.shape[1]
    at = other_tokens(heavy, tokens)
    k, v = of_tokens(keys.float(), at), of_tokens(values.float(), at)
    both = torch.cat([k, v], -1).transpose(1, 2)
    convolved = F.conv1d(both, weight, bias, padding=weight.shape[-1] // 2)
    rows = convolved.relu().softmax(-1)
    place = torch.zeros(len(keys), tokens, dtype=torch.long, device=keys.device)
    place.scatter_(1, at, torch.arange(at.shape[1], device=at.device).expand_as(at))
    own = F.one_hot(place.gather(1, residual), at.shape[1]).float()
    mixed = (1 - share) * own + share * rows
    return mixed @ k, mixed @ v
