"""What is measured of policies that generate side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class GenerationRun:
    """One policy over the tokens that the full cache generated.

    Args:
        name: the policy's.
        kl: divergence from the full cache at every step, ``[T]`` nats.
        nll: negative log-likelihood of the next generated token, ``[T]`` nats.
        full_nll: the same under the full cache.
        agrees: whether the likeliest next token is the full cache's, ``[T]``.
        evicted: entries that left while decoding, ``[L, H]``: proof that the policy fired.
        trimmed: prompt tokens that left when the prompt was complete, ``[L, H]``.
        peak_entries: most entries at once, the newest included, ``[L, H]``.
        mean_bytes: of the cache, its statistics and lengths, mean over steps.
        peak_bytes: likewise with every head at its peak.
        statistics_bytes: the part of the mean that is the method's statistics.
    """

    name: str
    kl: NDArray[np.float32]
    nll: NDArray[np.float32]
    full_nll: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    evicted: NDArray[np.int64]
    trimmed: NDArray[np.int64]
    peak_entries: NDArray[np.int64]
    mean_bytes: float
    peak_bytes: float
    statistics_bytes: float


class Measured:
    """What is kept of every step, in room taken once.

    Small tensors that stay, allocated step by step between the logits that go, would leave the
    heap in pieces that no logits fit into again: it grew by a step's logits with every step.
    """

    def __init__(self, policies: int, first: Tensor, room: int) -> None:
        """Allocate the tensors of all steps.

        Args:
            policies: B, the full cache among them as the first.
            first: token that each prompt's caches read first, ``[P]``.
            room: steps.
        """
        prompts, device = len(first), first.device
        self.tokens = torch.zeros(prompts, room + 1, dtype=torch.int64, device=device)
        self.tokens[:, 0] = first
        shape = policies, prompts, room
        self._kl, self._nll = (torch.zeros(shape, device=device) for _ in range(2))
        self._agrees = torch.zeros(shape, dtype=torch.bool, device=device)

    def put(self, step: Tensor, logits: Tensor, chosen: Tensor) -> None:
        """KL from the full cache, the chosen token's NLL, and whether the likeliest agree.

        Args:
            step: from 0, ``[1]`` int64.
            logits: ``[B, P, vocabulary]``.
            chosen: the tokens that the full cache chose, ``[P]``.
        """
        ours = logits.log_softmax(-1)
        likeliest = logits.argmax(-1)
        picked = chosen[None, :, None].expand(len(ours), -1, 1)
        kl = (ours[0].exp() * (ours[0] - ours)).sum(-1)
        self.tokens.index_copy_(1, step + 1, chosen[:, None])
        self._kl.index_copy_(2, step, kl[..., None])
        self._nll.index_copy_(2, step, -ours.gather(-1, picked))
        self._agrees.index_copy_(2, step, (likeliest == likeliest[0])[..., None])

    def first(self, steps: int) -> tuple[NDArray[Any], ...]:
        """KL, NLL and agreement of the first so many steps, ``[B, P, steps]`` each."""
        whole = self._kl, self._nll, self._agrees
        return tuple(each[..., :steps].cpu().numpy() for each in whole)
