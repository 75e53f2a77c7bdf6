"""Models that bring their own code: none of it is run, so their layers may be any."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kvtune.common.errors import KvtuneError


def check_own_code(config: Mapping[str, Any], file: str) -> None:
    """Refuse a model whose own code defines its class, where transformers has none of that name.

    Its type may be one that transformers knows, and its layers still be others.

    Raises:
        KvtuneError: it is such a model, or its classes are no list of names.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise KvtuneError(
            f"'architectures' must be a list of class names, not {str(named)[:60]}",
            where=file,
            hint='write it as ["LlamaForCausalLM"], with the model\'s own class.',
        )
    if not config.get("auto_map") or not named or any(name in known_classes() for name in named):
        return
    raise KvtuneError(
        f"{named[0][:60]} comes with the model's own code, which is not run: its layers are not "
        "known",
        where=file,
        hint="if they are those of its model_type, leave auto_map out of a copy of the file.",
    )


@functools.cache
def known_classes() -> frozenset[str]:
    """Names of transformers' classes that generate text."""
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return frozenset(name for table in tables for name in table.values())
