"""A2SF: accumulated attention that forgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor

_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class A2SF(DecodeMethod):
    """Old tokens had more rows to collect from; a forgetting factor makes sums comparable.

    drawn[j] = sum over queries of factor^(newest - q) * attention[q, j], mean over the head group
    keep = first ``sinks`` + last ``recent`` + most drawn of the rest
    While decoding: drawn = factor * drawn + newest row; one entry leaves, the newest token too may.

    ``factor`` 1 is H2O's score, 0 that of TOVA with a choice a KV head.

    Source: Jo and Shin, "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token
    Pruning in Transformer Decoder", arXiv 2407.20485. Two presets: ``DECODE`` (the default; factor
    0.2, no window: the paper's, whose evaluation evicts at every row) and ``PREFILL`` (factor
    0.95, 16 recent tokens: the authors' later code, which trims the prompt once). Differs: the
    prompt runs dense and is trimmed when complete, not row by row; rows weighing less than a
    millionth are left out; query heads that share a KV head are averaged.
    Cost: O(Hq R P D) once a prompt, R = ln 1e-6 / ln factor rows (all rows for a factor of 1); then
    one row and one ranking a token and layer. State: one float an entry of a KV head.
    """

    name = "a2sf"
    source = "Jo and Shin, arXiv 2407.20485"

    factor: float = parameter(0.2, "what a row's weight is multiplied with a token", low=0, high=1)
    sinks: int = parameter(
        0, "first tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    recent: int = parameter(
        0, "newest tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )

    @property
    def needs(self) -> Needs:
        """The rows that are not yet forgotten."""
        return Needs(column_sums=True) if self.factor == 1 else Needs(window=self._rows)

    @property
    def entry_bits(self) -> int:
        """A float32: the discounted attention that the entry has received."""
        return 32

    @property
    def _rows(self) -> int:
        """Last rows whose weight is not negligible."""
        if self.factor == 0:
            return 1
        return math.ceil(math.log(_NEGLIGIBLE) / math.log(self.factor))

    def protected(self, budget: int) -> tuple[int, int]:
        """Sinks and recent window; none in the paper."""
        return self.sinks, self.recent

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """Attention drawn over the prompt, old rows discounted."""
        import torch

        if self.factor == 1:
            return {"drawn": signals.column_sums().mean(1)}
        rows = signals.window_attention(self._rows).mean(1)  # [H, R, P]
        age = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
        weight = torch.tensor(self.factor, device=rows.device) ** age
        return {"drawn": (rows * weight[:, None]).sum(1)}

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Forget a little, add the newest row."""
        state.statistics["drawn"].mul_(self.factor).add_(attention.mean(2))

    def worth(self, state: DecodeState) -> Tensor:
        """The discounted attention that each entry has received."""
        return state.statistics["drawn"]


DECODE = A2SF()
PREFILL = A2SF(factor=0.95, recent=16)
