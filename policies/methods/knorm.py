"""L2 norm of keys: keys of small length draw the most attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KNorm(DecodeMethod):
    """Keeps the tokens whose keys have the smallest Euclidean length; looks at no attention.

    score[j] = -|k[j]|, at the prompt's end and of every token that is generated

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    EMNLP 2024, arXiv 2406.11430. Differs: the authors leave the first two layers uncompressed; here
    a policy says so by giving those layers another option. RoPE leaves lengths as they are, so keys
    after it serve.
    Cost: O(H P D) once a prompt, O(H D) a generated token; one number an entry of state.
    """

    name = "knorm"
    source = "Devoto et al., EMNLP 2024, arXiv 2406.11430"

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """The length of every prompt token's key."""
        return {"length": signals.keys.float().norm(dim=-1)}

    def fresh(
        self, state: DecodeState, keys: Tensor, values: Tensor
    ) -> Mapping[str, float | Tensor]:
        """The length of the new token's key."""
        return {"length": keys.float().norm(dim=-1)}

    def worth(self, state: DecodeState) -> Tensor:
        """Short keys are worth the most."""
        return -state.statistics["length"]

    @property
    def entry_bits(self) -> int:
        """A float32 an entry."""
        return 32
