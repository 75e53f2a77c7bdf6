"""What choosing tokens costs, declared so that latency and memory models can read it; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.policies.signals import Needs

_SCORE_BYTES = 4
_KV_BYTES = 2
_LAUNCHES = {"window": 12, "moments": 20, "later": 8, "repeated": 12, "choice": 10}
"""Kernels that torch launches for a layer's signals, and for ranking and keeping: as counted."""


@dataclass(frozen=True)
class LayerShape:
    """One layer at one prompt length.

    Args:
        prompt_tokens: P.
        query_heads: Hq.
        kv_heads: H.
        head_dim: D.
    """

    prompt_tokens: int
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Work:
    """Of one layer of one prompt, beside the prompt's own pass.

    Args:
        flops: floating-point operations.
        moved_bytes: read from and written to device memory.
        passes: extra forward passes over the prompt, of the whole model.
        softmax_flops: operations of products that each go through an exponential at once, in a
            kernel that keeps no matrix of them.
        launches: kernels that the host starts, whatever they do; of all heads together.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    passes: float = 0.0
    softmax_flops: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.passes + other.passes,
            self.softmax_flops + other.softmax_flops,
            self.launches + other.launches,
        )

    def __sub__(self, part: Work) -> Work:
        """What is left without a part of it."""
        return self + Work(*(-value for value in vars(part).values()))


_MOMENT_BYTES = 70.0
"""That each number of the queries moves, as counted: to float32, turned back to before RoPE by five
plain kernels, averaged, centred, and multiplied with itself."""
_STUDIED = 192.0  # generated tokens: four answers of 48


def work_of_signals(needs: Needs, shape: LayerShape) -> Work:
    """What it takes to compute the signals that a method names.

    Look-ahead signals are no part of any real run and cost nothing here.
    """
    tokens, heads, size = shape.prompt_tokens, shape.query_heads, shape.head_dim
    keys = shape.kv_heads * tokens * size * _KV_BYTES
    rows = min(needs.window, tokens)
    total = Work()
    if rows:
        products = 2.0 * rows * tokens * size * heads
        moved = keys + 3 * rows * tokens * heads * 4.0
        total += Work(products, moved, launches=_LAUNCHES["window"])
    if needs.column_sums:  # exp(q k) below the diagonal twice: row sums first, then columns
        products = 2.0 * heads * size * tokens**2
        moved = 2 * keys + 2 * heads * tokens * 4.0
        total += Work(moved_bytes=moved, softmax_flops=products, launches=2)
    if needs.query_moments:
        products, moved = 2.0 * heads * tokens * size**2, heads * tokens * size * _MOMENT_BYTES
        total += Work(products, moved, launches=_LAUNCHES["moments"])
    if needs.later_queries:
        moved = 8.0 * heads * min(tokens, 512) * size
        total += Work(moved_bytes=moved, launches=_LAUNCHES["later"])
    if needs.repeat_queries and not needs.reconstruction:
        total += Work(passes=1.0, launches=_LAUNCHES["repeated"])
    if needs.study_queries:  # answers are generated token by token, and each reads the prompt
        total += Work(
            8.0 * heads * size * tokens * _STUDIED, keys * _STUDIED, launches=4 * _STUDIED
        )
    if needs.reconstruction:
        products = 4.0 * heads * size * tokens**2
        total += Work(products, 2.0 * keys, passes=1.0, launches=_LAUNCHES["repeated"])
    return total


def work_of_choice(shape: LayerShape, budget: int) -> Work:
    """Ranking every token of every KV head, reading what stays and writing it elsewhere."""
    scores = shape.kv_heads * shape.prompt_tokens * _SCORE_BYTES
    kept = 4 * shape.kv_heads * min(budget, shape.prompt_tokens) * shape.head_dim * _KV_BYTES
    return Work(moved_bytes=4.0 * scores + kept, launches=_LAUNCHES["choice"])
