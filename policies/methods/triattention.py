"""TriAttention's scores: distances that the mean query before RoPE prefers, and keys' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.rotary import turn
from kvtune.policies.method import ScoredMethod
from kvtune.policies.registry import parameter
from kvtune.policies.signals import ALL_QUERIES, Needs, Signals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TriAttention(ScoredMethod):
    """Queries before RoPE lie close to a fixed centre, so that distances can be preferred.

    of pair f:   c = mean query, m = mean length of queries, both of a query head before RoPE
    trig[j]    = sum over pairs of |c| |k_j| cos(w (d + o) + arg c - arg k_j), d = distance of j
                 from the prompt's end, mean over the offsets o = 1, 2, 4, ... ``farthest``
    norm[j]    = sum over pairs of (1 - |c| / m) m |k_j|
    score[j]   = max over the head's group of trig[j] + norm[j], standardised over tokens

    Source: Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression",
    arXiv 2604.04921, in its style: formulas are ours from its description. Differs: centres are of
    the prompt's own queries, where the authors calibrate them once; the choice falls once, when the
    prompt is complete, where the authors repeat it while generating.
    Cost: O(Hq P D log(farthest)) once a prompt.
    """

    name = "triattention"
    source = "in the style of Mao et al., arXiv 2604.04921"

    farthest: int = parameter(
        65536, "largest distance looked ahead", unit="tokens", low=1, high=2**20
    )

    @property
    def needs(self) -> Needs:
        """Every query of the prompt, for centres and lengths, before RoPE."""
        return Needs(window=ALL_QUERIES, rope=True)

    def scores(self, signals: Signals) -> Tensor:
        """Standardised a query head; the highest of the group."""
        each = self.by_query_head(signals)
        spread = each.std(-1, correction=0, keepdim=True).clamp_min(1e-12)
        highest: Tensor = ((each - each.mean(-1, keepdim=True)) / spread).amax(1)
        return highest

    def by_query_head(self, signals: Signals) -> Tensor:
        """Scores before they are standardised, ``[H, G, P]``."""
        import torch

        keys, queries = self._plain(signals)  # [H, P, D], [H, G, P, D]
        frequencies = () if signals.rope is None else signals.rope.inverse_frequencies
        pairs = len(frequencies)
        centre = queries.mean(2)
        c = torch.complex(centre[..., :pairs], centre[..., pairs : 2 * pairs])  # [H, G, F]
        k = torch.complex(keys[..., :pairs], keys[..., pairs : 2 * pairs])  # [H, P, F]
        q = queries[..., : 2 * pairs].unflatten(-1, (2, pairs))
        length = q.norm(dim=-2).mean(2)
        w = torch.tensor(frequencies, device=keys.device)
        wave = self._mean_wave(signals.prompt_tokens, w)
        trig = torch.einsum("hgf,hpf->hgp", c, k.conj() * wave).real
        rest = torch.einsum("hgd,hpd->hgp", centre[..., 2 * pairs :], keys[..., 2 * pairs :])
        norm = torch.einsum("hgf,hpf->hgp", length - c.abs(), k.abs())
        total: Tensor = trig + rest + norm
        return total

    def _mean_wave(self, tokens: int, frequencies: Tensor) -> Tensor:
        """Mean over offsets of exp(i w (distance + offset)), ``[P, F]``."""
        import torch

        device = frequencies.device
        distance = torch.arange(tokens - 1, -1, -1, device=device)
        offset = 2 ** torch.arange(self.farthest.bit_length(), device=device)
        angle = (distance[:, None] + offset)[..., None].double() * frequencies.double()
        wave: Tensor = torch.polar(torch.ones_like(angle), angle).mean(1)
        return wave.to(torch.complex64)

    def _plain(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Keys ``[H, P, D]`` and queries ``[H, G, P, D]`` before RoPE, but for its factor."""
        import torch

        keys, queries = signals.keys.float(), signals.queries[:, -signals.prompt_tokens :].float()
        if signals.rope is not None:
            at = torch.arange(signals.prompt_tokens, device=keys.device)
            keys, queries = turn(keys, -at, signals.rope), turn(queries, -at, signals.rope)
        return keys, queries.unflatten(0, (len(keys), -1))
