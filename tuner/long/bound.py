"""What all heads of a sequence may hold in a long generation, and what they would in 16 bits."""

from __future__ import annotations

from kvtune.common.errors import KvtuneError
from kvtune.common.units import format_bytes, parse_bytes
from kvtune.policies.formats.bf16 import Bf16
from kvtune.simulator.memory.weights import (
    check_format,
    formats_by_width,
    listed_formats,
    weight_bytes,
)
from kvtune.tuner.request import SearchRequest


def read_bound(text: str, request: SearchRequest) -> int:
    """Bytes of a bound: ``60MB``, or ``10%`` of the uncompressed cache's mean over the steps.

    Raises:
        KvtuneError: it is neither, or no share.
    """
    if not text.endswith("%"):
        return parse_bytes(text)
    shape = request.shape
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise KvtuneError(
            f"{text!r} is no share of the cache",
            where="--held-bytes",
            hint="a size such as 60MB, or a share such as 10%.",
        )
    heads = shape.layers * shape.kv_heads
    full = mean_full_bytes(request.context_tokens, request.generated_tokens, heads, shape.head_dim)
    return int(share * full)


def check_fits(bound_bytes: int, request: SearchRequest) -> None:
    """Refuse a bound that the card's memory does not hold beside the weights.

    Raises:
        KvtuneError: says what both take.
    """
    shape = request.shape
    formats = listed_formats(request.weights, shape, request.gpu)
    if formats == ("auto",):
        formats = formats_by_width(shape, request.gpu)
    weights = min(int(weight_bytes(shape, check_format(each)).value) for each in formats)
    if weights + bound_bytes > request.memory_bytes:
        raise KvtuneError(
            f"{format_bytes(weights)} of weights and a cache of {format_bytes(bound_bytes)} take "
            f"more than the {format_bytes(request.memory_bytes)} that there are",
            where="--held-bytes",
            hint="lower the bound, name narrower --weights, or raise --mem.",
        )


def mean_full_bytes(prompt_tokens: int, generated: int, heads: int, head_dim: int) -> float:
    """Bytes of the uncompressed cache in 16 bits, mean over the steps of a generation."""
    entry = 2 * Bf16().bound(1, head_dim, "keys")
    return (prompt_tokens + (generated + 1) / 2) * heads * entry
