"""KeyDiff: keys unlike the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import Method, ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyDiff(ScoredMethod):
    """Keys that point away from the mean direction draw attention: geometry alone decides.

    anchor   = mean over the prompt of k[j] / |k[j]|
    score[j] = -cos(k[j], anchor)
    keep     = highest scores

    Source: Park et al., "KeyDiff", arXiv 2504.15364, 3, in the form that kvpress gives it: one
    choice at the prompt's end. The paper's own schedule is ``keydiff_blockwise``. Each KV head for
    itself; float32 throughout, since near-constant key dimensions make cosines saturate.
    Cost: O(H P D) once a prompt, no attention weights; no state.
    """

    name = "keydiff"
    source = "Park et al., arXiv 2504.15364"

    def scores(self, signals: Signals) -> Tensor:
        """Unlikeness to the mean direction."""
        return unlikeness(signals.keys)

    def work(self, shape: LayerShape, budget: int) -> Work:
        """All keys in 32 bits, their unit vectors' mean, and each one's likeness to it."""
        numbers = float(shape.kv_heads * shape.prompt_tokens * shape.head_dim)
        return super().work(shape, budget) + Work(6 * numbers, 24 * numbers, launches=13)


@dataclass(frozen=True)
class KeyDiffBlockwise(Method):
    """KeyDiff as a prompt comes in: after every block, the cache is cut down to the budget.

    start with the first ``budget`` tokens; for each ``block`` that follows: append it, score all
    that is held against their own anchor, keep the highest ``budget``

    Source: Park et al., "KeyDiff", arXiv 2504.15364, 3.2; blocks of 128 as published. Differs from
    the paper: the choice is blockwise, but the prompt's hidden states are those of the full cache.
    Cost: O(H (P / block) (budget + block) D) once a prompt; no state.
    """

    name = "keydiff_blockwise"
    source = "Park et al., arXiv 2504.15364"

    block: int = parameter(
        128, "tokens that come in together", unit="tokens", low=1, high=LONGEST_PROMPT
    )

    def keep(self, signals: Signals, budget: int) -> Tensor:
        """What is left after the last block."""
        import torch

        heads, tokens, _ = signals.keys.shape
        budget = min(budget, tokens)
        place = torch.arange(tokens, device=signals.keys.device).expand(heads, -1)
        held = place[:, :budget]
        for start in range(budget, tokens, self.block):
            held = torch.cat((held, place[:, start : start + self.block]), 1)
            scores = unlikeness(of_tokens(signals.keys, held))
            best = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :budget]
            held = held.gather(1, (held.shape[1] - 1 - best).sort(-1).values)
        return held

    def work(self, shape: LayerShape, budget: int) -> Work:
        """The likeness of what is held to its mean, and its ranking, once a block."""
        blocks = max(shape.prompt_tokens - budget, 0) / self.block
        held = shape.kv_heads * float(budget + self.block) * shape.head_dim
        once = Work(6 * held, 12 * held, launches=23)
        more = Work(blocks * once.flops, blocks * once.moved_bytes, launches=blocks * once.launches)
        return super().work(shape, budget) + more


def unlikeness(keys: Tensor) -> Tensor:
    """Minus the cosine between each key and the mean of all unit keys, ``[H, n]``."""
    import torch.nn.functional as F

    anchor = F.normalize(keys.float(), dim=-1).mean(-2, keepdim=True)
    return -F.cosine_similarity(keys.float(), anchor, dim=-1)
