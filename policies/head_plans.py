"""Policies made of head scores: RazorAttention, DuoAttention, RLKV and HeadKV; without torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.head_scores import Floats
from kvtune.policies.method import Method
from kvtune.policies.methods.razor import Razor
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import Budget, Option
from kvtune.policies.policy import Policy

DUO = StreamingLLM(sinks=64)
"""DuoAttention's streaming heads; its deployed window is 256."""
RLKV = StreamingLLM(sinks=16)
"""RLKV's; its window is 64."""
HEADKV = SnapKV(window=8)
"""HeadKV's choice within a head: 8 queries, max pooling over 7."""


def most(scores: Floats, share: float) -> NDArray[np.bool_]:
    """The heads of highest score over the whole model, one at least; of equals the first."""
    count = max(1, round(share * scores.size))
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    found = np.zeros(scores.size, bool)
    found[order] = True
    return found.reshape(scores.shape)


def razor_heads(
    induction: Floats, echo: Floats, of_induction: float = 0.14, of_echo: float = 0.01
) -> NDArray[np.bool_]:
    """RazorAttention's retrieval heads: the top of either score, over the model, ``[L, H]``."""
    return most(induction, of_induction) | most(echo, of_echo)


def two_kinds(name: str, in_full: NDArray[np.bool_], other: Method, tokens: int) -> Policy:
    """Some heads keep everything, the others go by ``other`` with so many tokens."""
    full, rest = Option(), Option(other, Budget(tokens=tokens))
    return Policy(name, tuple(tuple(full if f else rest for f in row) for row in in_full))


def razor_plan(
    induction: Floats, echo: Floats, prompt_tokens: int, buffer: int = 4000, share: float = 0.2
) -> Policy:
    """RazorAttention as published: retrieval heads in full, the others max(4000, N / 5) tokens."""
    method = Razor()
    tokens = method.sinks + max(buffer, round(share * prompt_tokens)) + 1
    return two_kinds("RazorAttention", razor_heads(induction, echo), method, tokens)


def gates_plan(
    name: str, gates: Floats, sparsity: float, streaming: StreamingLLM, window: int
) -> Policy:
    """DuoAttention and RLKV: the highest gates in full, the others sinks and a window.

    Gates saturate, and of equal ones the first stay in full, where the authors draw at random.
    """
    return two_kinds(name, most(gates, 1 - sparsity), streaming, streaming.sinks + window)


def headkv_plan(scores: Floats, mean_tokens: int, beta: float = 1.2) -> Policy:
    """HeadKV: SnapKV with a pool of the budget shared out by head score.

    cap[h] = importance[h] * floor(b / beta) * heads + b - floor(b / beta), b = mean - window

    Of KV heads, so that bytes are those of a grouped cache; the authors store every query head.
    """
    base = max(mean_tokens - HEADKV.window, 0)
    pool = math.floor(base / beta)
    clipped = np.clip(scores.astype(np.float64), 0, None)
    total = clipped.sum()
    importance = clipped / total if total > 0 else np.full(scores.shape, 1 / scores.size)
    caps = np.rint(importance * pool * scores.size + base - pool).astype(int) + HEADKV.window
    heads = tuple(
        tuple(Option(HEADKV, Budget(tokens=int(cap))) for cap in row) for row in caps.tolist()
    )
    return Policy("HeadKV", heads)
