"""Prompt dropping: tokens that a model finds easy to foresee are left out before the prefill.

A surrogate for Pan et al., "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic
Prompt Compression", ACL Findings 2024, arXiv 2403.12968, whose trained classifier is not at hand:
tokens are ranked by their self-information under the model itself, as Li et al., "Compressing
Context to Enhance Inference Efficiency of Large Language Models" ("Selective Context"), EMNLP 2023,
arXiv 2310.06201, rank them. Ranking costs a pass of its own over the whole prompt; what is saved is
the cache of every layer and head, and the prefill of a model that did not do the ranking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_observed
from kvtune.traces.seam import causal_attention


def self_information(loaded: LoadedModel, token_ids: Sequence[int]) -> Tensor:
    """Nats that each token takes given those before it, ``[T]``; of the first, infinity."""

    def handler(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        return causal_attention(q, k, v, scale, window)

    with torch.no_grad():
        logits = run_observed(loaded, token_ids, 0, handler)[0, :-1].float()
    targets = torch.tensor(list(token_ids[1:]), device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.cat([nats.new_full((1,), torch.inf), nats])


def shortened(
    loaded: LoadedModel, token_ids: Sequence[int], share: float, kept_last: int = 0
) -> tuple[int, ...]:
    """The prompt's most informative tokens, in order.

    Args:
        loaded: the model that ranks.
        token_ids: of the prompt, two or more.
        share: of the tokens that stay, rounded up; of equal information the earlier one.
        kept_last: tokens at the end that stay whatever they tell, such as a question; the first
            token always does.

    Raises:
        KvtuneError: the share is not within 0 and 1.
    """
    if not 0 < share <= 1:
        raise KvtuneError(f"a share of {share} of the tokens", hint="give a number from 0 to 1.")
    nats = self_information(loaded, token_ids)
    nats[len(token_ids) - kept_last :] = torch.inf
    count = max(math.ceil(share * len(token_ids)), kept_last + 1)
    best = nats.argsort(descending=True, stable=True)[:count]
    return tuple(token_ids[place] for place in best.sort().values.tolist())
