"""MLX: flags of ``mlx_lm.generate`` and ``mlx_lm.server``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from kvtune.policies.export.engine_wide import (
    CacheType,
    EngineWide,
    limits_of_types,
    one_of,
    positive,
    sixteen_bits,
    text,
)
from kvtune.policies.export.plan import Plan

_GROUP = 64


def _type(bits: int) -> CacheType:
    """Codes, and a 16-bit scale and offset for each 64 channels of a token."""
    detail = f"groups of {_GROUP} channels of a token, a 16-bit scale and offset each"
    size = (bits + 32 / _GROUP) / 4  # bytes of a key's and a value's channel
    return CacheType(
        str(bits), (bits, bits), lambda head_dim: head_dim * size, f"int{bits}", detail, _GROUP
    )


_TYPES = (sixteen_bits("16"), _type(8), _type(4), _type(3), _type(2))


@dataclass(frozen=True)
class MLX(EngineWide):
    """One number of bits for the whole cache; per-layer caches exist in Python alone."""

    name = "mlx"
    stack = "mlx-lm"
    stack_version = "0.32.2"
    source = "mlx_lm/generate.py, mlx_lm/models/cache.py"
    proof = "parsed by the stack"
    types = _TYPES
    limits = limits_of_types(_TYPES)
    why_dropped = "a rotating cache keeps sinks and the newest of all heads alike, quantised or not"
    notes = (
        "mlx_lm.generate and the flags of mlx.txt",
        "heads have to be a multiple of 64 channels for a quantised cache.",
        "--max-kv-size is left out: models that make their own caches ignore it silently.",
    )
    schema = {  # noqa: RUF012
        "model": text,
        "kv-bits": one_of(2, 3, 4, 8),
        "kv-group-size": one_of(32, 64, 128),
        "quantized-kv-start": one_of(0),
        "max-tokens": positive,
    }

    def config(self, plan: Plan, chosen: CacheType, batch: int) -> dict[str, Any]:
        """The flags and their values; a 16-bit cache needs none."""
        answer = max(1, plan.sequence_tokens - plan.context_tokens)
        narrow = {"kv-bits": int(chosen.name), "kv-group-size": _GROUP, "quantized-kv-start": 0}
        return {
            **({"model": plan.model} if plan.model else {}),
            **({} if chosen.name == "16" else narrow),
            "max-tokens": answer,
        }

    def file(self, config: dict[str, Any]) -> tuple[str, str]:
        """The flags in one line of text."""
        flags = [f"--{key} {shlex.quote(str(value))}" for key, value in config.items()]
        return "mlx.txt", " ".join(flags) + "\n"
