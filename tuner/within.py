"""A search inside what a serving stack can express: fewer options, and heads that choose alike."""

from __future__ import annotations

from itertools import product

from kvtune.policies.export.contract import find_exporter
from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.format import Format, formats
from kvtune.policies.formats.bf16 import Bf16
from kvtune.policies.option import Option
from kvtune.tuner.options import Menu, Pair

SPLITS = {"head": ("heads", "layers"), "layer": ("layers",), "engine": ("engine",)}
"""What may choose for itself, by what a stack lets have a format and a budget of its own."""
_ORDER = ("engine", "layer", "head")


def limits_of(stack: str | None) -> EngineLimits | None:
    """What a stack can take; None where a search is free.

    Raises:
        KvtuneError: no exporter has this name.
    """
    return find_exporter(stack).limits if stack else None


def stores_alike(stack: str | None) -> bool:
    """Whether live runs for a stack store answers as prompts, in formats that are its own."""
    limits = limits_of(stack)
    return limits is not None and limits.stores_alike and bool(limits.own)


def menu_within(menu: Menu, limits: EngineLimits | None) -> Menu:
    """A menu's methods that a stack runs, in all formats that it stores."""
    if limits is None:
        return menu
    known = [Bf16(), *limits.own] if limits.own else [kind() for kind in formats().values()]
    pairs: list[Pair] = [pair for pair in product(known, known) if limits.stores(*pair)]
    methods = tuple(method for method in menu.methods if method.name in limits.methods)
    return Menu(methods, menu.shares, tuple(sorted(pairs, key=_bits, reverse=True)))


def expressible(option: Option, limits: EngineLimits | None) -> bool:
    """Whether a stack can give a head this option, first tokens in 16 bits aside from the rest."""
    if limits is None:
        return True
    if option.on_host:
        return False
    runs = option.budget.resolve(2**20) == 2**20 or option.method.name in limits.methods
    exact = any(form.exact_tokens for form in (option.keys, option.values))
    stored = limits.stores(option.keys, option.values)
    return stored and runs and (limits.formats == "head" or not exact)


def splits_of(limits: EngineLimits | None) -> tuple[str, ...]:
    """What may choose for itself."""
    if limits is None:
        return SPLITS["head"]
    evicts = limits.methods - {"full"}
    scopes = (limits.formats, limits.budgets) if evicts else (limits.formats,)
    return SPLITS[min(scopes, key=_ORDER.index)]


def format_label(option: Option) -> str:
    """The formats of an option's keys and values, of which such a stack has one beside 16 bits."""
    return f"{option.keys.label}/{option.values.label}"


def is_narrow(option: Option) -> bool:
    """Whether it stores fewer than 16 bits."""
    return option.keys.bits < 16 or option.values.bits < 16


def _bits(pair: tuple[Format, Format]) -> float:
    return pair[0].bits + pair[1].bits
