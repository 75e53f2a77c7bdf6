"""What rounding alone makes of a live loss where the model runs in 16 bits.

In bfloat16 or float16 any change of the cache, however small, makes other sums round otherwise, and
each layer passes that on. A live loss (KL from the uncompressed cache) therefore starts at a floor
that says nothing of the policy. To measure it, the uncompressed cache answers the same tokens once
more, in two ways whose results would be equal without rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.policies.attention import attend, merge
from kvtune.runtime.prompts import Prompt, refuse_window
from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import run_observed
from kvtune.traces.samples import Sample


def rounds_visibly(loaded: LoadedModel) -> bool:
    """Whether live losses have such a floor: in float32 it is far below any loss."""
    return loaded.dtype != "float32"


def kl_of_rounding(loaded: LoadedModel, sample: Sample, prompt: Prompt, full: Tensor) -> Tensor:
    """KL of the uncompressed cache from itself, run in two other ways by one pass.

    The two ways are the rows of a batch of two, a size that ``full`` need not have had: in the
    first the prompt is attended to as ``full_cache`` does, in the second in two halves.

    Args:
        loaded: the model.
        sample: whose observed tokens are run.
        prompt: of the sample.
        full: log-probabilities under the uncompressed cache as live losses are measured from,
            ``[C, vocabulary]`` float32.

    Returns:
        ``[2, C]`` nats; a row is zero where nothing was rounded otherwise.
    """
    tokens = sample.prompt
    handler = _Split(prompt, (tokens, tokens // 2))
    with torch.no_grad():
        logits = run_observed(loaded, sample.token_ids[tokens:], tokens, handler, copies=2)
    ours = logits.float().log_softmax(-1)
    return ((full - ours) * full.exp()).sum(-1)


class _Split:
    """Answers attention to a whole prompt in two parts, split elsewhere in each row of the batch.

    Args:
        prompt: of the sample.
        ends: for each row, how many of the prompt's tokens make the first part; the others are
            summed with the observed tokens.
    """

    def __init__(self, prompt: Prompt, ends: tuple[int, ...]) -> None:
        self.prompt, self.ends = prompt, ends

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer, float32 inside as in ``live.answer``."""
        signals = self.prompt(layer)
        refuse_window(layer, window, signals.prompt_tokens + q.shape[2])
        grouped = q.float().unflatten(1, (k.shape[1], -1))  # [B, H, G, C, D]
        past = signals.keys, signals.values
        rows = [
            _in_two(grouped[row], past, (k[row].float(), v[row].float()), end, scale)
            for row, end in enumerate(self.ends)
        ]
        return torch.stack(rows).flatten(1, 2).to(q.dtype)


def _in_two(
    queries: Tensor,
    past: tuple[Tensor, Tensor],
    recent: tuple[Tensor, Tensor],
    end: int,
    scale: float,
) -> Tensor:
    """Attention of ``[H, G, C, D]`` queries to a prompt and, causally, to the observed tokens.

    Args:
        queries: of the observed tokens, float32.
        past: keys and values of the prompt, each ``[H, P, D]``.
        recent: of the observed tokens, each ``[H, C, D]``.
        end: prompt tokens of the first part.
        scale: factor of the scores before the softmax.
    """
    observed = queries.shape[-2]
    keys, values = (
        torch.cat([before[:, end:], now], 1)[:, None]
        for before, now in zip(past, recent, strict=True)
    )
    visible = torch.ones(observed, keys.shape[-2], dtype=torch.bool, device=keys.device)
    visible = visible.tril(keys.shape[-2] - observed)
    first = attend(queries, past[0][:, None, :end], past[1][:, None, :end], None, scale)
    return merge(first, attend(queries, keys, values, visible, scale))
