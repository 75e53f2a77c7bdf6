"""LazyEviction: tokens that go quiet and return are kept for as long as they use to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.policies.decode import DecodeMethod, DecodeState
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class LazyEviction(DecodeMethod):
    """In long reasoning tokens recur: evict seldom, and only what is overdue.

    active[t, j] = max over the head group of attention[t, j] >= threshold
    last[j] = step of j's last activation; gap[j] = the longest time between two of them
    score[j] = H1 + H2, sigma the logistic function
    H1 = 2 sigma(-h1_shift - (t - last[j]) / gap[j])
    H2 = 2 sigma(1 - gap[j]) (``code``), 2 sigma(-1 / gap[j]) (``note``) or 0 (``off``); 0 without
         a gap
    Every ``window`` tokens, if the budget is exceeded: keep = last ``window`` + highest scores.
    In between a cache grows beyond its budget by up to ``window`` entries.

    ``prompt``: the authors' code neither watches nor trims the prompt before the first eviction
    (``kept``); ``watched``, the default and ours, counts its last ``window`` rows as steps and
    trims it when complete, so that a budget holds from the first token.

    Source: Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for
    Efficient Long Reasoning", arXiv 2506.15969. Defaults are the authors' for GSM8K on
    DeepSeek-R1-Distill-Qwen-7B: window 101 (near the 80th percentile of gaps, to be calibrated per
    model and task), threshold 1e-4. Their code starts a token's clock one step before it enters,
    so that looking at itself already counts as a gap of 1, and with ``code`` such a token is worth
    1 for ever; ``count_own`` False leaves that out. Differs: one choice a KV head, active for any
    of its query heads (the authors store keys and values per query head); clocks are integers in
    32 bits, theirs round in 16.
    Cost: one row a token and layer, one ranking in ``window`` tokens. State: two integers an entry
    of a KV head.
    """

    name = "lazy_eviction"
    source = "Zhang et al., arXiv 2506.15969"

    window: int = parameter(
        101, "tokens between evictions, all kept", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    threshold: float = parameter(1e-4, "attention from which a token is active", low=0, high=1)
    h1_shift: float = parameter(
        1.0, "shift of H1: 1 as in the code, 0 as in the paper", low=0, high=10
    )
    h2: Literal["code", "note", "off"] = parameter("code", "form of the second term")
    count_own: bool = parameter(True, "whether a token's attention to itself is an activation")
    prompt: Literal["watched", "kept"] = parameter("watched", "what happens to the prompt")

    @property
    def needs(self) -> Needs:
        """The prompt's last rows, if it is watched."""
        return Needs(window=self.window if self.prompt == "watched" else 0)

    @property
    def trims_prompt(self) -> bool:
        """Only a watched prompt is trimmed before the first eviction."""
        return self.prompt == "watched"

    @property
    def entry_bits(self) -> int:
        """Two 32-bit integers."""
        return 64

    @property
    def reads_step_number(self) -> bool:
        """Always: entries remember the step at which they were last looked at."""
        return True

    def protected(self, budget: int) -> tuple[int, int]:
        """The observation window."""
        return 0, self.window

    def most(self, held: int, budget: int) -> int:
        """A window more than what is held after an eviction."""
        return max(held, budget) + self.window

    def drops(
        self, sizes: NDArray[np.int64], budgets: NDArray[np.int64], generated: int
    ) -> NDArray[np.int64]:
        """What is beyond the budget, once a window."""
        due = generated % self.window == 0
        return (sizes - budgets).clip(0) * due

    def statistics(self, signals: Signals) -> dict[str, Tensor]:
        """Last activation and longest gap; steps count from the prompt's last token, which is 0."""
        import torch

        heads, tokens, _ = signals.keys.shape
        at = torch.arange(tokens, device=signals.keys.device) - tokens + 1
        if self.prompt == "kept":
            nothing = torch.zeros(heads, tokens, dtype=torch.int64, device=at.device)
            return {"last": nothing, "gap": nothing.clone()}
        rows = signals.window_attention(self.window).amax(1)  # [H, W, P]
        steps = at[tokens - rows.shape[1] :, None]
        start = (at - int(self.count_own)).clamp_min(-self.window).expand(heads, 1, -1)
        active = (rows >= self.threshold) & (at <= steps)
        clock = torch.cat((start, torch.where(active, steps, start)), 1).cummax(1).values
        gaps = torch.where(active, steps - clock[:, :-1], 0)
        return {"last": clock[:, -1], "gap": gaps.amax(1)}

    def fresh(
        self, state: DecodeState, keys: Tensor, values: Tensor
    ) -> Mapping[str, float | Tensor]:
        """A token's clock starts as it enters, or one step before."""
        return {"last": state.generated - self.count_own}

    def observe(self, state: DecodeState, attention: Tensor) -> None:
        """Stop the clock of the active ones and start it again."""
        import torch

        active = attention.amax(2) >= self.threshold
        last, gap = state.statistics["last"], state.statistics["gap"]
        elapsed = (state.generated - last) * active
        state.statistics["gap"] = torch.maximum(gap, elapsed)
        state.statistics["last"] = torch.where(active, state.generated, last)

    def worth(self, state: DecodeState) -> Tensor:
        """How likely each entry is to return."""
        quiet = (state.generated - state.statistics["last"]).float()
        gap = state.statistics["gap"].float()
        overdue = 2 * (-self.h1_shift - quiet / (gap + 1e-5)).sigmoid()
        if self.h2 == "off":
            return overdue
        returns = 1 - gap if self.h2 == "code" else -1 / gap.clamp_min(1)
        return overdue + 2 * returns.sigmoid() * (gap > 0)
