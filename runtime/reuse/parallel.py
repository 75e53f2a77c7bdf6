"""APE: contexts encoded apart from each other, read together with a temperature and a scale.

After Yang et al., "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel
Encoding", ICLR 2025, arXiv 2502.05431, and its demonstration code, which raises the contexts'
log-sum-exp to ``scale * temperature`` (other scripts of the same repository do otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.policies.attention import attend, merge
from kvtune.runtime.reuse.passes import PromptCache, encoded, joined, refuse_windows, tokens_of
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import prompt_cache, run_observed


@dataclass(frozen=True)
class ParallelContexts:
    """A shared prefix, and contexts that each follow it at the same positions.

    Args:
        prefix: its cache.
        contexts: keys and values of all contexts, one behind the other; their order is no matter.
        next_position: of the first token that reads them: behind the longest context.
        temperature: the contexts' logits are divided by it.
        scale: with the temperature, what the contexts' log-sum-exp is multiplied by.
    """

    prefix: PromptCache
    contexts: PromptCache
    next_position: int
    temperature: float = 0.9
    scale: float = 0.9

    @staticmethod
    def of(
        loaded: LoadedModel,
        prefix: Sequence[int],
        contexts: Sequence[Sequence[int]],
        temperature: float = 0.9,
        scale: float = 0.9,
    ) -> ParallelContexts:
        """Encode every context by itself, after the prefix.

        Raises:
            KvtuneError: a layer slides.
        """
        refuse_windows(loaded, len(prefix) + max(map(len, contexts)))
        with torch.no_grad():
            shared = prompt_cache(loaded, prefix)
        parts = [encoded(loaded, ids, shared) for ids in contexts]
        end = len(prefix) + max(tokens_of(part) for part in parts)
        return ParallelContexts(shared, joined(parts), end, temperature, scale)

    def logits(self, loaded: LoadedModel, token_ids: Sequence[int]) -> Tensor:
        """Logits of tokens that read prefix and contexts, ``[C, vocabulary]``."""
        with torch.no_grad():
            return run_observed(loaded, token_ids, self.next_position, self.attention)[0]

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """One layer's attention, as the seam asks for it; float32 inside."""
        queries = q.float().unflatten(1, (k.shape[1], -1))  # [B, H, G, C, D]
        read_keys, read_values = (x.float()[:, :, None] for x in self.contexts[layer])
        read = attend(queries, read_keys, read_values, None, scale / self.temperature)
        before = [x.expand(k.shape[0], -1, -1, -1) for x in self.prefix[layer]]
        keys, values = (
            torch.cat([shared, own], 2).float()[:, :, None]
            for shared, own in zip(before, (k, v), strict=True)
        )
        count, shared_tokens = q.shape[2], before[0].shape[2]
        causal = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
        visible = torch.cat([causal.new_ones(count, shared_tokens), causal], 1)
        others = attend(queries, keys, values, visible, scale)
        weighted = read[0], read[1] * (self.scale * self.temperature)
        return merge(weighted, others).flatten(1, 2).to(q.dtype)
