"""EMS, reconstructed: evict by a global and local score, merge some of what is evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtune.common.rotary import turn
from kvtune.policies.gathering import of_tokens
from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import LONGEST_PROMPT, parameter
from kvtune.policies.signals import Needs, Signals
from kvtune.policies.work import LayerShape, Work

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EMSReconstruction(ScoredMethod):
    """Tokens that matter, but not enough to stay, are averaged into the kept token most like them.

    score     = max(global * mean(local) / mean(global), local), a KV head: attention summed over
                all prompt queries, and over the last ``window``; group means
    centres   = highest ``budget - window`` scores before the window; the window stays as it is
    to merge  = the others among the highest scores that hold ``mass`` of all score
    like      = relu(cos(k, k')) * relu(cos(v, v')); below ``threshold`` a token is dropped instead
    v[centre] = score-weighted mean of its tokens; k likewise in direction, of unchanged length

    Source: our reconstruction after the abstract and public reviews of Li et al., "EMS: Adaptive
    Evict-then-Merge Strategy", arXiv 2412.08521; there is no public code. Window, mass, threshold
    and weighting are ours: figures say nothing about the paper's own method. Its centres per head
    and its cadence while decoding are not reconstructed.
    Cost: column sums, O(Hq W P D), and O(H P budget D) for likeness; no state after the prompt.
    """

    name = "ems_reconstruction"
    source = "reconstructed after Li et al., arXiv 2412.08521"

    window: int = parameter(
        32, "recent queries counted and tokens kept", unit="tokens", low=1, high=LONGEST_PROMPT
    )
    mass: float = parameter(0.95, "share of all score that is worth merging", low=0, high=1)
    threshold: float = parameter(0.6, "likeness below which a token is dropped", low=0, high=2)
    merge_keys: bool = parameter(True, "whether keys are merged too, or values alone")
    space: Literal["post_rope", "pre_rope"] = parameter(
        "post_rope", "where keys are compared and averaged"
    )

    @property
    def needs(self) -> Needs:
        """Column sums and the window; positions where keys are compared before RoPE."""
        return Needs(window=self.window, column_sums=True, rope=self.space == "pre_rope")

    def protected(self, budget: int) -> tuple[int, int]:
        """The newest tokens always stay."""
        return 0, self.window

    def scores(self, signals: Signals) -> Tensor:
        """The larger of global and local attention, on one scale."""
        import torch

        everywhere = signals.column_sums().mean(1)
        local = signals.window_attention(self.window).sum(-2).mean(1)
        before = slice(0, max(signals.prompt_tokens - self.window, 1))
        ratio = local[:, before].mean(1) / everywhere[:, before].mean(1).clamp_min(1e-20)
        return torch.maximum(everywhere * ratio[:, None], local)

    def merge(self, signals: Signals, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each token to be merged goes to its likest centre, if that is like enough."""
        before = max(signals.prompt_tokens - self.window, 0)
        centres = int((kept[:1] < before).sum())  # the same of every head: the window stays
        if centres == 0 or kept.shape[1] == signals.prompt_tokens:
            return None
        scores = self.scores(signals)[:, :before].clamp_min(1e-20)
        joined = self._joined(signals, scores, kept[:, :centres])
        return self._averaged(signals, scores, kept, joined)

    def _joined(self, signals: Signals, scores: Tensor, centres: Tensor) -> Tensor:
        """Which token goes to which centre, ``[H, tokens before the window, centres]`` bool."""
        import torch
        import torch.nn.functional as F

        before = scores.shape[1]
        ranked, order = scores.sort(dim=-1, descending=True)
        above = ranked.cumsum(-1) - ranked < self.mass * ranked.sum(-1, keepdim=True)
        worth = torch.zeros_like(above).scatter(1, order, above).scatter(1, centres, False)
        like = torch.ones((), device=scores.device)
        for tensor in (self._in_space(signals), signals.values.float()):
            unit = F.normalize(tensor[:, :before], dim=-1)
            like = like * (unit @ of_tokens(unit, centres).transpose(-1, -2)).relu()
        most, home = like.max(-1, keepdim=True)
        goes = worth[..., None] & (most >= self.threshold)
        return torch.zeros_like(like, dtype=torch.bool).scatter(2, home, goes)

    def _averaged(
        self, signals: Signals, scores: Tensor, kept: Tensor, joined: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score-weighted means, written over the centres."""
        import torch.nn.functional as F

        before, count = scores.shape[1], joined.shape[2]
        centres = kept[:, :count]
        weights = (joined * scores[..., None]).transpose(-1, -2)  # [H, centres, tokens]
        weights = weights.scatter(2, centres[..., None], scores.gather(1, centres)[..., None])
        keys, values = (
            of_tokens(signals.keys, kept).clone(),
            of_tokens(signals.values, kept).clone(),
        )
        mean = weights @ signals.values[:, :before].float() / weights.sum(-1, keepdim=True)
        values[:, :count] = mean.to(values.dtype)
        if self.merge_keys:
            space = self._in_space(signals)[:, :before]
            direction = F.normalize(weights @ F.normalize(space, dim=-1), dim=-1)
            length = of_tokens(space, centres).norm(dim=-1, keepdim=True)
            back = self._from_space(signals, direction * length, centres)
            keys[:, :count] = back.to(keys.dtype)
        return keys, values

    def _in_space(self, signals: Signals) -> Tensor:
        import torch

        keys = signals.keys.float()
        if self.space == "post_rope" or signals.rope is None:
            return keys
        return turn(keys, -torch.arange(keys.shape[1], device=keys.device), signals.rope)

    def _from_space(self, signals: Signals, keys: Tensor, places: Tensor) -> Tensor:
        if self.space == "post_rope" or signals.rope is None:
            return keys
        return turn(keys, places, signals.rope)

    def work(self, shape: LayerShape, budget: int) -> Work:
        """Likeness of all tokens to all centres, and the means."""
        pairs = float(shape.kv_heads * shape.prompt_tokens * min(budget, shape.prompt_tokens))
        more = Work(8 * pairs * shape.head_dim, 8 * pairs, launches=70)
        return super().work(shape, budget) + more
