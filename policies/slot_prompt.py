"""What is kept of a prompt to open a cache of slots with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.kept import ask
from kvtune.policies.method import Method
from kvtune.policies.option import ALL, Option
from kvtune.policies.signals import Signals
from kvtune.policies.slot_bytes import EXACT, Forms
from kvtune.policies.storage import store


@dataclass(frozen=True)
class Prompt:
    """What is kept of a layer's prompt, to open a cache with.

    Args:
        positions: of the kept tokens, ``[B, H, n]`` int64; of a row only the first few are real.
        sizes: how many, ``[B, H]``.
        keys: ``[B, H, n, D]``, as read back from storage.
        values: likewise.
    """

    positions: Tensor
    sizes: NDArray[np.int64]
    keys: Tensor
    values: Tensor


def prompt_of(
    method: Method,
    signals: Signals,
    budgets: NDArray[np.int64],
    *,
    heads: Sequence[int] | None = None,
    evicts: bool = True,
    forms: Forms = EXACT,
) -> Prompt:
    """Some heads of a layer's prompt, trimmed by one method, ``[B, H, ...]``.

    Args:
        method: chooses.
        signals: of the whole layer.
        budgets: ``[B, H]``.
        heads: which of the layer's KV heads these are; all unless given.
        evicts: whether the method goes on evicting; if not, what it merges is stored merged.
        forms: how keys and values are stored; full precision unless given.
    """
    tokens = signals.prompt_tokens
    whole = evicts and isinstance(method, DecodeMethod) and not method.trims_prompt
    sizes = np.full_like(budgets, tokens) if whole else budgets.clip(0, tokens)
    rows, each = [[Option(method, ALL, *forms)] * sizes.shape[1]] * len(sizes), sizes.tolist()
    kept = ask(rows, each, signals, heads=numbers_of(heads, signals), goes_on=evicts)
    stored = store(rows, each, kept, signals)
    positions = pad_sequence(kept.tokens, batch_first=True).unflatten(0, sizes.shape)
    return Prompt(positions, sizes, stored.keys, stored.values)


def numbers_of(heads: Sequence[int] | None, signals: Signals) -> list[int]:
    """Which of the layer's KV heads are meant; all unless given."""
    return list(range(signals.keys.shape[0]) if heads is None else heads)
