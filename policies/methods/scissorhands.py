"""Scissorhands: tokens that stayed unimportant over a history window leave in bulk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Scissorhands(DecodeMethod):
    """Importance persists: drop what was below average most often, when the cache is full.

    low[q, j] = attention[q, j] < 1 / (keys that q sees), on the mean row of the head group
    score[j] = -(share of the last ``history`` rows that saw j in which it was low)
    keep = last ``recent`` + highest scores of the rest
    While decoding, nothing leaves until the budget is exceeded; then ``drop_share * budget``
    entries leave at once, so that a cache holds less than its budget most of the time.

    Source: Liu et al., "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM
    KV Cache Compression at Test Time", NeurIPS 2023, arXiv 2305.17118, its second algorithm; 400
    rows and 10 recent tokens as published. How much leaves at once is not certain from the paper;
    half the budget is what a public reimplementation (cold-compress) uses. The authors' released
    code is another procedure, without a budget, and is not copied. Differs: counts are divided by
    the rows that a token has lived through; the prompt is trimmed to the budget exactly; their
    models have no grouped queries. Their budgets per layer are an allocator's matter here.
    Cost: O(Hq history P D) once a prompt; then one row a token and layer, and one ranking in
    ``drop_share * budget`` tokens. State: ``history`` bits an entry of a KV head.
    """

    name = "scissorhands"
    source = "Liu et al., NeurIPS 2023, arXiv 2305.17118"

    history: int = parameter(400, "rows that are remembered", unit="tokens", low=1, high=4096)
    recent: int = parameter(
        10, "newest tokens that are always kept", unit="tokens", low=0, high=LONGEST_PROMPT
    )
    drop_share: float = parameter(0.5, "share of the budget that leaves at once", low=0, high=1)

    @property
    def needs(self) -> Needs:
        """The history window."""
        return Needs(window=self.history)

    @property
    def entry_bits(self) -> int:
        """One bit a remembered row."""
        return self.history

    @property
    def reads_step_number(self) -> bool:
        """It says which row of the ring is the oldest."""
        return True

    def protected(self, budget: int) -> tuple[int, int]:
        """The newest tokens, as far as a bulk drop leaves room for them."""
        return 0, min(self.recent, budget - self._bulk(budget))

    def drops(
        self, sizes: NDArray[np.int64], budgets: NDArray[np.int64], generated: int
    ) -> NDArray[np.int64]:
        """Nothing, or a bulk of entries, where the budget is exceeded."""
        import numpy as np

        excess = (sizes - budgets).clip(0)
        bulk = (budgets * self.drop_share).astype(np.int64)
        return np.where(excess > 0, np.maximum(excess, bulk), 0)

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """Where each token was low in the prompt's last rows: a ring over rows, ``[H, P, w]``."""
        import torch

        rows = signals.window_attention(self.history).mean(1)  # [H, W, P]
        heads, count, tokens = rows.shape
        at = torch.arange(tokens - count, tokens, device=rows.device)
        column = torch.arange(tokens, device=rows.device)
        low = (rows < 1 / (at[:, None] + 1)) & (column <= at[:, None])
        ring = torch.zeros(heads, tokens, self.history, dtype=torch.bool, device=rows.device)
        ring[..., at % self.history] = low.transpose(1, 2)
        return {"low": ring}

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Overwrite the oldest row of the ring."""
        average = 1 / state.live.sum(-1, keepdim=True)
        state.statistics["low"][..., state.now % self.history] = attention.mean(2) < average

    def worth(self, state: DecodeState) -> Tensor:
        """How rarely each entry was low among the remembered rows that saw it."""
        seen = (state.now + 1 - state.positions).clamp(1, self.history)
        return -(state.statistics["low"].sum(-1) / seen)

    def _bulk(self, budget: int) -> int:
        return int(budget * self.drop_share)
