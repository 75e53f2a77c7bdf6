"""ActQKV's layer budgets: more blocks where the prompt's queries spread over many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.pyramid import round_to_sum
from kvtune.policies.method import Method
from kvtune.policies.methods.actqkv import ActQKV, Probe
from kvtune.policies.reader import Held
from kvtune.policies.registry import parameter
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ActQKVLayers(Allocator):
    """Every layer gets ``least`` of the mean; the entropy of its blocks' scores shares the rest.

    entropy[l] = mean over the last ``queries`` prompt queries of H(softmax over blocks of score[b])
                 / log(blocks); the scores are ActQKV's
    budget[l]  = mean * (least + (1 - least) * layers * entropy[l] / sum(entropy)), at most ``most``

    Source: Xiao et al., ACL 2025, arXiv 2502.13542, the information-density cut-off; 100 queries,
    least 32 of 46 blocks and at most twice the mean are of the authors' code. Differs: entropies
    are taken once, when the prompt is complete, where the authors follow them while generating and
    hand out what earlier layers left. Policies whose heads have other methods stay as given.
    Cost: O(queries Hq D P / b) once a prompt.
    """

    name = "actqkv_layers"
    source = "Xiao et al., ACL 2025, arXiv 2502.13542"

    queries: int = parameter(100, "prompt queries that entropies are taken over", low=1, high=4096)
    least: float = parameter(0.7, "a layer's budget over the mean, at least", low=0, high=1)
    most: float = parameter(2.0, "a layer's budget over the mean, at most", low=1, high=4096)

    @property
    def needs(self) -> Needs:
        """The prompt's last queries; ActQKV itself asks for all of them."""
        return Needs(window=self.queries)

    def settle(
        self,
        budgets: NDArray[np.int64],
        methods: Sequence[Sequence[Method]],
        prompt: Callable[[int], Signals],
    ) -> NDArray[np.int64]:
        """The least for everyone, the rest by entropy."""
        import numpy as np

        total = int(budgets.sum())
        mean = total / max(budgets.size, 1)
        readers = [_reader(row, round(mean)) for row in methods]
        if total == 0 or any(reader is None for reader in readers):
            return budgets
        found = np.array(
            [entropy(r, prompt(at), self.queries) for at, r in enumerate(readers) if r is not None]
        )
        share = found / found.sum() if found.sum() > 0 else np.full(len(found), 1 / len(found))
        layers = mean * (self.least + (1 - self.least) * len(found) * share)
        wanted = np.repeat(layers, budgets.shape[1]).reshape(budgets.shape)
        ceiling = min(prompt(0).prompt_tokens, int(np.ceil(self.most * mean)))
        return round_to_sum(wanted, total, ceiling)


def _reader(methods: Sequence[Method], budget: int) -> Probe | None:
    """The layer's reader under the mean budget; None where a head has another method."""
    method = methods[0]
    if not isinstance(method, ActQKV) or set(methods) != {method}:
        return None
    return method.reader(budget)


def entropy(reader: Probe, signals: Signals, queries: int) -> float:
    """Normalised entropy of the layer's block scores, from 0 to 1."""
    import torch

    heads, tokens, _ = signals.keys.shape
    number = torch.arange(heads, device=signals.keys.device)
    held = Held(
        signals.keys.float(),
        torch.full_like(number, tokens),
        torch.arange(tokens, device=number.device).expand(heads, -1),
        number,
        torch.zeros_like(number),
        signals,
        tokens - min(queries, tokens),
    )
    rows = signals.queries[:, -min(queries, tokens) :].float().unflatten(0, (heads, -1))
    scores = reader.score(held, rows, reader.index(held))[0]  # [C, b], the layer's
    blocks = int((scores[0] > -torch.inf).sum())
    if blocks < 2:
        return 0.0
    p = scores.softmax(-1)
    return float(-torch.xlogy(p, p).sum(-1).mean()) / math.log(blocks)
