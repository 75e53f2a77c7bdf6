"""The menu: every option that a KV head may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.grouped import Int2, Int4
from kvtune.policies.method import Method
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.option import ALL, Budget, Option

Pair = tuple[Format, Format]


@dataclass(frozen=True)
class Menu:
    """Methods x shares of the prompt x (key, value) formats, and everything kept in each format.

    Args:
        methods: whom to keep.
        shares: of the prompt's tokens, below 1.
        formats: for keys and values.
    """

    methods: tuple[Method, ...]
    shares: tuple[float, ...]
    formats: tuple[Pair, ...]

    def options(self) -> tuple[Option, ...]:
        """All options, those that keep every token last."""
        evicting = product(self.methods, self.shares, self.formats)
        return (
            *(Option(method, Budget(share=share), *pair) for method, share, pair in evicting),
            *(Option(Full(), ALL, *pair) for pair in self.formats),
        )


def alike(formats: Sequence[Format]) -> tuple[Pair, ...]:
    """The same format for keys and values."""
    return tuple((form, form) for form in formats)


SMALL_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
METHODS: tuple[Method, ...] = (SnapKV(), H2O(), StreamingLLM())
SMALL = Menu(METHODS, SMALL_SHARES, alike((Bf16(), Int4(), Int2())))
"""57 options: three methods, six budgets, three precisions, and all tokens in each precision."""

LAPTOP = Menu(
    METHODS,
    SMALL_SHARES,
    (
        (Bf16(), Bf16()),
        (Int4(), Int4()),
        (Int4(exact_first=4), Int4(exact_first=4)),
        (Int4(exact_first=4), Int2(exact_first=4)),
    ),
)
"""76 options, sinks in 16 bits among them, that two CPU cores replay in half a minute."""

FULL = Menu(
    METHODS,
    tuple(n / 1792 for n in (16, 24, 32, 48, 64, 96, 128, 192, 256, 448, 896)),
    (
        (Bf16(), Bf16()),
        (Int4(), Int4()),
        (Int2(), Int2()),
        (Int4(exact_first=4), Int4(exact_first=4)),
        (Int4(exact_first=4), Int2(exact_first=4)),
    ),
)
"""170 options, 16 to 896 tokens of a prompt of 1792; for a GPU."""
