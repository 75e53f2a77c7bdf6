"""Self-study: the model answers requests about a prompt, and its queries tell what it looks for.

After Eyuboglu et al., "Cartridges", arXiv 2506.06266, whose training text is what the model says
about a document, and Zweiger et al., arXiv 2602.16284, who take reference queries from such text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtune.traces.passes import full_cache_handler, run_observed

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.traces.models import LoadedModel

REQUESTS = (
    "\n\nSummarize the previous context:\n",
    "\n\nList the names and numbers in the previous context:\n",
    "\n\nHere is a question about the previous context, with its answer.\nQuestion:",
    "\n\nThe most important facts above are:\n1.",
)
ANSWER = 48  # tokens of each
MOST = 512  # queries of a head


def study_queries(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    cache: Sequence[tuple[Tensor, Tensor]],
    answer: int = ANSWER,
) -> list[Tensor]:
    """Queries of requests and answers behind a prompt; every answer is the likeliest one.

    Args:
        loaded: the model.
        token_ids: the prompt [P].
        cache: its keys and values, (k, v) a layer, each [1, H, P, D].
        answer: tokens of each answer.

    Returns:
        For each layer [Hq, n, D] float32, n at most 512.
    """
    import torch

    full, layers = full_cache_handler(cache), range(len(cache))
    queries: list[list[Tensor]] = [[] for _ in layers]

    def keep(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        queries[layer].append(q[0].float())
        return full(layer, q, k, v, scale, window)

    with torch.no_grad():
        for request in REQUESTS:
            text = list(loaded.tokenizer(request, add_special_tokens=False).input_ids)
            for _ in range(answer):
                logits = run_observed(loaded, text, len(token_ids), full)
                text.append(int(logits[0, -1].argmax()))
            run_observed(loaded, text, len(token_ids), keep)
    return [_sampled(torch.cat(queries[layer], 1)) for layer in layers]


def _sampled(queries: Tensor) -> Tensor:
    """Evenly spaced ones, as many as ``MOST``."""
    return queries[:, :: -(-queries.shape[1] // MOST)]
