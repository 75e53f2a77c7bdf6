"""Prompts of different lengths, for tests of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor


def ids(*lengths: int) -> dict[str, Tensor]:
    """Token ids and mask ``[B, P]`` by seed, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    tokens = torch.randint(2, 250, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}
