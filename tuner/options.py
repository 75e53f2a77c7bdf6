"""The menu: every option that a KV head may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from operator import or_

from kvtune.policies.format import Format
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.formats.fitted import Allocated
from kvtune.policies.formats.grouped import Int2, Int3, Int4
from kvtune.policies.formats.rotated import RotatedInt2, RotatedInt3, RotatedInt4
from kvtune.policies.formats.turboquant import TurboQuant2, TurboQuant3, TurboQuant4
from kvtune.policies.method import Method, methods
from kvtune.policies.methods.a2sf import A2SF, PREFILL
from kvtune.policies.methods.attention_matching import AttentionMatching
from kvtune.policies.methods.full import Full
from kvtune.policies.methods.h2o import H2O
from kvtune.policies.methods.landmark import Landmark
from kvtune.policies.methods.quest import Quest
from kvtune.policies.methods.snapkv import SnapKV
from kvtune.policies.methods.streaming_llm import StreamingLLM
from kvtune.policies.methods.weighted_keys import WeightedKeys
from kvtune.policies.option import ALL, Budget, Option
from kvtune.policies.placement import ranks_without_newest
from kvtune.policies.signals import Needs
from kvtune.tuner.left_out import LEFT_OUT

Pair = tuple[Format, Format]


WEIGHTED_BY: tuple[WeightedKeys, ...] = (WeightedKeys("snapkv"), WeightedKeys("h2o"))
"""Rules around what chooses tokens, for formats that divide bits among channels."""


@dataclass(frozen=True)
class Menu:
    """Methods x shares of the prompt x (key, value) formats, and everything kept in each format.

    Args:
        methods: whom to keep.
        shares: of the prompt's tokens, below 1.
        formats: for keys and values.
        weighted: formats for keys that ``weighted_keys`` scales, around ``weighted_by``.
        weighted_by: that choose tokens for those formats.
        more: menus whose options this one has too, such as a method at small shares alone.
    """

    methods: tuple[Method, ...]
    shares: tuple[float, ...]
    formats: tuple[Pair, ...]
    weighted: tuple[Pair, ...] = ()
    weighted_by: tuple[WeightedKeys, ...] = WEIGHTED_BY
    more: tuple[Menu, ...] = ()

    def options(self) -> tuple[Option, ...]:
        """All options, those that keep every token last; none that the runtime would refuse to
        read by pages."""
        menus = (self, *self.more)
        evicting = [option for menu in menus for option in menu._evicting()]
        whole = [option for menu in menus for option in menu._whole()]
        return tuple(dict.fromkeys((*evicting, *whole)))

    def _evicting(self) -> list[Option]:
        """Options that keep some tokens, without those of ``more``."""
        chosen = [
            *product(self.methods, self.shares, self.formats),
            *product(self.weighted_by, self.shares, self.weighted),
        ]
        options = (Option(method, Budget(share=share), *pair) for method, share, pair in chosen)
        return [option for option in options if not ranks_without_newest(option)]

    def _whole(self) -> list[Option]:
        """Options that keep every token, without those of ``more``."""
        return [
            *(Option(Full(), ALL, *pair) for pair in self.formats),
            *(Option(WeightedKeys(), ALL, *pair) for pair in self.weighted),
        ]

    @property
    def needs(self) -> Needs:
        """The signals that its methods read together: what a trace has to hold."""
        weighted = self.weighted_by if self.weighted else ()
        own = [method.needs for method in (*self.methods, *weighted)]
        return reduce(or_, (*own, *(menu.needs for menu in self.more)), Needs())


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


ROTATED: tuple[Pair, ...] = (
    (RotatedInt4(exact_first=4), RotatedInt4(exact_first=4)),
    (Int3(exact_first=4), Int3(exact_first=4)),
    (RotatedInt3(exact_first=4), RotatedInt3(exact_first=4)),
    (RotatedInt4(exact_first=4), RotatedInt2(exact_first=4)),
    (Int4(exact_first=4), RotatedInt2(exact_first=4)),
    (RotatedInt2(exact_first=4), RotatedInt2(exact_first=4)),
    (TurboQuant4(exact_first=4), TurboQuant4(exact_first=4)),
    (TurboQuant3(exact_first=4), TurboQuant3(exact_first=4)),
    (TurboQuant3(exact_first=4), TurboQuant2(exact_first=4)),
)
"""Rotated keys and values, and three bits, which the menu of all methods has besides. At three and
four bits TurboQuant loses less than evenly spaced codes, of a quarter of a bit less."""

WEIGHTED: tuple[Pair, ...] = (
    (Allocated(mean_bits=3.0), Allocated(mean_bits=3.0, directions="hadamard")),
    (Allocated(mean_bits=2.25), Allocated(mean_bits=2.0, directions="hadamard")),
)
"""Bits by channel behind ``weighted_keys``, which that menu has too: 3.2 and 2.3 bits, everything
counted, that lose less than all others of so many."""

FEW = replace(
    LAPTOP,
    more=(
        Menu((AttentionMatching(select="h2o"),), SMALL_SHARES[:4], LAPTOP.formats[:3]),
        Menu((), SMALL_SHARES[4:], (), WEIGHTED[:1], (WeightedKeys("h2o"),)),
    ),
)
"""91 options: the laptop's, fitted values at small shares, and bits by channel at larger ones.

Of what was tried, these lower the laptop's predicted losses most for what they cost
(``benchmarks/results/menu-times-few-cpu.json``). Eleven more, fitted values in two bits and bits by
channel at small shares or of 2.3 bits, lowered no held-out loss
(``benchmarks/results/few-options-cpu.json``)."""

READERS: tuple[Method, ...] = (Quest(block=64), Landmark(block=64))
"""Beside the three, where a search limits what is read; their blocks are the runtime's pages."""


def every_method(
    *, calibrated: bool = True, reads_less: bool = False, pairs: bool = False
) -> tuple[Method, ...]:
    """All registered methods that choose when the prompt is complete and that a server could run.

    As published; A2SF as its authors set it for prompts. ``left_out.LEFT_OUT`` says of all others
    why they are not among them.

    Args:
        calibrated: whether the model has a calibration; without one, what needs it is left out.
        reads_less: whether a step's reading is limited; where it is not, readers, which hold
            everything, are no better than the full cache, and are left out.
        pairs: whether two layers may choose together; without, what links layers is left out.
    """
    kinds = (kind for _, kind in sorted(methods().items()))
    made = [PREFILL if kind is A2SF else kind() for kind in kinds if kind.name not in LEFT_OUT]
    return tuple(
        method
        for method in made
        if not method.looks_ahead
        if calibrated or not method.needs.calibration
        if (pairs or not method.needs.linked) and (reads_less or method.reader(1) is None)
    )
