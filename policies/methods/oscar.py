"""OSCAR: keys and values in the basis of what attention reads of them, then two bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.method import Method
from kvtune.policies.parts import Part, PartPlan
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = (Bf16(), Bf16())


@dataclass(frozen=True)
class Oscar(Method):
    """A rotation of each head, fitted to other text beforehand; ends of the prompt in 16 bits.

    U of keys   = eigenvectors of Q'Q of the queries that read the head
    U of values = eigenvectors of V'S'S V, S = attention
    k U and v U are stored in the option's formats, the first ``sinks`` and the newest ``recent``
    tokens of what is kept as they are

    The published setting has ``{name: rotated_int2, group: 128}`` for both, whose Hadamard matrix
    is the other half of its rotation; the bit reversal behind it matters only where a token has
    more than one group. The matrices are a model's, as its weights are, and take no bytes of a
    prompt; ``python -m kvtune.runtime.learn MODEL oscar`` fits them. A budget below the prompt
    keeps the newest tokens.

    Source: Zhou et al., "OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache
    Quantization", arXiv 2605.17757. Differs: rotations are of each KV head; thresholds of
    clipping are one number (the format's) and not fitted by layer; generated tokens stay in 16
    bits, where theirs enter the codes as they leave the window of recent ones.
    Cost: one product of D by D a token; no state of a prompt.
    """

    name = "oscar"
    source = "Zhou et al., arXiv 2605.17757"
    heads_are_alike = False

    sinks: int = parameter(4, "first tokens in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT)
    recent: int = parameter(
        0, "newest tokens in 16 bits", unit="tokens", low=0, high=LONGEST_PROMPT
    )

    @property
    def looks_across_heads(self) -> bool:
        """A head's matrices are found by its number."""
        return True

    @property
    def needs(self) -> Needs:
        """The rotations that were fitted to the model."""
        return Needs(learned=True)

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """The newest tokens."""
        import torch

        heads, tokens, _ = signals.keys.shape
        first = max(tokens - budget, 0)
        return torch.arange(first, tokens, device=signals.keys.device).expand(heads, -1)

    def parts(self, signals: Signals, budget: int) -> list[Part]:
        """The first tokens, those that are coded, the newest."""
        kept = self.keep(signals, budget)
        turns = signals.matrices("oscar_keys"), signals.matrices("oscar_values")
        sizes = self._sizes(kept.shape[-1])
        first, coded, last = kept.split(sizes, -1)
        found = [
            Part(first, formats=_EXACT), Part(coded, turns=turns), Part(last, formats=_EXACT)
        ]  # fmt: skip
        return [part for part, size in zip(found, sizes, strict=True) if size] or [Part(kept)]

    def plan(self, budget: int, prompt_tokens: int) -> tuple[PartPlan, ...]:
        """The sizes of the three."""
        first, coded, last = self._sizes(min(budget, prompt_tokens))
        found = (PartPlan(first, _EXACT), PartPlan(coded, turned=True), PartPlan(last, _EXACT))
        return tuple(part for part in found if part.entries) or (PartPlan(0),)

    def _sizes(self, kept: int) -> tuple[int, int, int]:
        """Tokens of the three parts."""
        first = min(self.sinks, kept)
        last = min(self.recent, kept - first)
        return first, kept - first - last, last
