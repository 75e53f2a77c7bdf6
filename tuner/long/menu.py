"""What a head may be given in a long generation, and the bytes that it then ever holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.decode import DecodeMethod
from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.rotated import RotatedInt3, RotatedInt4
from kvtune.policies.methods.a2sf import PREFILL
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.tova import Tova
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.room import Room
from kvtune.policies.signals import Needs
from kvtune.policies.slot_bytes import held_bytes


@dataclass(frozen=True)
class LongMenu:
    """Methods x budgets x formats of single tokens, and everything kept in each format.

    Args:
        methods: whose heads choose alone.
        shares: of all tokens, prompt and generated, that a head may hold.
        formats: of keys and values alike.
        residual: newest generated tokens that stay in 16 bits, up to twice as many, where fewer
            bits are stored.
    """

    methods: tuple[DecodeMethod, ...] = (PREFILL, StreamingLLM(), H2O(), Tova(unit="kv_head"))
    shares: tuple[float, ...] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
    formats: tuple[Format, ...] = (Bf16(), RotatedInt4(), RotatedInt3())
    residual: int = 16

    def options(self, tokens: int) -> tuple[Option, ...]:
        """All options for a sequence of so many tokens, those that keep everything last.

        In the same order for every number of tokens: what was replayed on a shorter sequence is
        taken for what the same shares lose on a longer one.
        """
        budgets = [max(round(share * tokens), 8) for share in self.shares]
        evicting = product(self.methods, budgets, self.formats)
        return (
            *(Option(method, Budget(tokens=n), form, form) for method, n, form in evicting),
            *(Option(Full(), ALL, form, form) for form in self.formats),
        )

    @property
    def needs(self) -> Needs:
        """The signals that its methods read together."""
        found = Needs()
        for method in self.methods:
            found |= method.needs
        return found

    def families(self, options: Sequence[Option]) -> Iterator[tuple[str, list[int]]]:
        """Sets of options that a plan is solved within, by name.

        One method in one format with what keeps everything in it; all methods in one format; and
        all that there is.
        """
        for form in self.formats:
            stored = [c for c, option in enumerate(options) if option.keys == form]
            for method in self.methods:
                own = [c for c in stored if options[c].method in (method, Full())]
                yield f"{method.label}, {form.label}", own
            if len(self.methods) > 1:
                yield f"all methods, {form.label}", stored
        yield "everything", list(range(len(options)))


def most_bytes(
    option: Option, prompt_tokens: int, generated: int, residual: int, head_dim: int
) -> int:
    """Most bytes that a head under an option ever holds, statistics included."""
    planned = option.budget.resolve(prompt_tokens)
    room = Room.of(option, planned, prompt_tokens)
    everything = prompt_tokens + generated
    entries = everything if room is None else min(room.most, everything)
    bits = option.method.entry_bits if isinstance(option.method, DecodeMethod) and room else 0
    forms = option.keys, option.values
    return int(np.ceil(held_bytes(np.array(entries), forms, residual, bits, head_dim)))


def footprints(
    options: Sequence[Option], prompt_tokens: int, generated: int, residual: int, head_dim: int
) -> NDArray[np.int64]:
    """The most bytes of one head under each option, ``[O]``."""
    shape = prompt_tokens, generated, residual, head_dim
    return np.array([most_bytes(option, *shape) for option in options], np.int64)
