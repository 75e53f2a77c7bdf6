"""What a policy file says of the model that it is for, from the model's shape."""

from __future__ import annotations

import re

from kvtune.policies.policy_file.document import ModelFacts
from kvtune.profiles.shape import ModelShape

_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)")


def model_facts(shape: ModelShape) -> ModelFacts:
    """Name, widths, longest context and, where the shape was read from the Hub, its id there."""
    found = _HUB.match(shape.source)
    return ModelFacts(
        shape.name,
        shape.layers,
        shape.kv_heads,
        shape.head_dim,
        shape.max_context,
        found[1] if found else "",
    )
