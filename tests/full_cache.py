"""What a model answers with its full cache, prompt and observed part apart as in a capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.traces.models import LoadedModel
from kvtune.traces.passes import full_cache_handler, prompt_cache, run_observed


def observed_logits(loaded: LoadedModel, token_ids: Sequence[int], observed: int) -> Tensor:
    """Full-cache logits of the last ``observed`` tokens [C, vocabulary], without gradients."""
    prompt = len(token_ids) - observed
    cache = prompt_cache(loaded, token_ids[:prompt])
    with torch.no_grad():
        logits = run_observed(loaded, token_ids[prompt:], prompt, full_cache_handler(cache))
    return logits[0]
