"""An encoded prompt cache on disk: one safetensors file that only its own model may read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvtune.common.bounds import Count, Name, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic
from kvtune.common.stored import checked, parse_json
from kvtune.runtime.transport.codec import Encoded, Level

FORMAT: Literal[2] = 2
"""In 1 the hash was of the buffers and tokens alone."""
_KEY = "kvtune_prompt_cache"
_AGAIN = "encode the prompt again with this model."


@dataclass(frozen=True)
class _Header:
    """What the file says of its buffers."""

    format: Literal[2]
    model_fingerprint: Name
    token_ids: tuple[Whole, ...]
    level: Level
    shape: tuple[Count, Count, Count, Count]
    sha256: Name


def save_cache(
    path: Path, encoded: Encoded, *, token_ids: Sequence[int], model_fingerprint: str
) -> None:
    """Write an encoded cache atomically.

    Args:
        path: ``*.safetensors``.
        encoded: of the whole prompt.
        token_ids: of the prompt.
        model_fingerprint: of the model whose cache it is.

    Raises:
        KvtuneError: there are more tokens, or fewer, than the cache holds.
    """
    if len(token_ids) != encoded.shape[2]:
        raise KvtuneError(f"{len(token_ids)} tokens, but a cache of {encoded.shape[2]}")
    header = _Header(
        FORMAT,
        model_fingerprint,
        tuple(token_ids),
        encoded.level,
        encoded.shape,
        _digest(encoded, token_ids),
    )
    data = save(dict(encoded.buffers), metadata={_KEY: json.dumps(asdict(header))})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def load_cache_file(path: Path, *, model_fingerprint: str) -> tuple[Encoded, tuple[int, ...]]:
    """An encoded cache, and the tokens of its prompt.

    Raises:
        KvtuneError: missing, damaged, or another model's.
    """
    where = str(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY, "{}")
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise KvtuneError("there is no such file", where=where) from error
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise KvtuneError("this cache cannot be read", where=where, hint=_AGAIN) from error
    header = checked(_Header, parse_json(text, where, _AGAIN), where, _AGAIN)
    if header.model_fingerprint != model_fingerprint:
        raise KvtuneError(
            f"this cache is of the model {header.model_fingerprint[:12]}..., not of "
            f"{model_fingerprint[:12]}...",
            where=where,
            hint=_AGAIN,
        )
    encoded = Encoded(header.level, header.shape, buffers)
    if header.sha256 != _digest(encoded, header.token_ids):
        raise KvtuneError("this cache is damaged: its hash differs", where=where, hint=_AGAIN)
    return encoded, header.token_ids


def _digest(encoded: Encoded, token_ids: Sequence[int]) -> str:
    """Over the buffers and all that says how to read them."""
    told = [asdict(encoded.level), list(encoded.shape), list(token_ids)]
    digest = hashlib.sha256(json.dumps(told).encode())
    for name, buffer in sorted(encoded.buffers.items()):
        digest.update(f"{name} {buffer.dtype} {buffer.shape}".encode())
        digest.update(np.ascontiguousarray(buffer).tobytes())
    return digest.hexdigest()
