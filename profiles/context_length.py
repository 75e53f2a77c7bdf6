"""The longest context that a configuration allows, rope scaling included, as vLLM derives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.common.errors import KvtuneError

NO_LIMIT = 2**31  # positions of models without position embeddings: the length has no end
_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
    "max_sequence_length", "max_seq_length", "seq_len", "model_max_length", "max_target_positions",
)  # fmt: skip
# Scalings whose stated length is the scaled one already (vllm/config/model.py).
_ALREADY_SCALED = ("su", "longrope", "llama3", "mrope", "default", "proportional")


def longest_context(config: Mapping[str, Any], file: str, default: int | None = None) -> int:
    """Tokens of prompt and answer together.

    Args:
        config: of the text model.
        file: named in errors.
        default: what the model's class assumes; None where it has no such number.

    Raises:
        KvtuneError: a length or a factor is no number above zero.
    """
    stated = [config[key] for key in _KEYS if config.get(key) is not None]
    for value in stated:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
            raise KvtuneError(
                f"the longest context must be a number of tokens, not {str(value)[:40]!r}",
                where=file,
            )
    longest = min((int(v) for v in stated), default=default or NO_LIMIT)
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(scaling, Mapping) and config.get("model_type") not in _OWN_LENGTH:
        longest = _scaled(longest, scaling, file)
    return min(longest, NO_LIMIT)


_OWN_LENGTH = ("gemma3", "gemma3_text")  # their stated length holds their factor


def _scaled(longest: int, scaling: Mapping[str, Any], file: str) -> int:
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind in _ALREADY_SCALED:
        return longest
    factor = scaling.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
        raise KvtuneError(
            f"rope's 'factor' must be a number above zero, not {factor!r}", where=file
        )
    original = scaling.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, (int, float)) and original >= 1:
        longest = int(original)
    return int(longest * factor)
