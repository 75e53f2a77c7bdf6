"""What a serving engine can take, for exports and for a search inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtune.policies.format import Format

Scope = Literal["engine", "layer", "head"]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine can take, for a search inside it.

    Args:
        methods: that it can run at all.
        key_formats: that it can store, nearly as kvtune does.
        value_formats: likewise.
        budgets: what may have a budget of its own.
        formats: what may have a format of its own.
        distinct_budgets: how many budgets below the full context; None for any number.
        distinct_formats: how many formats beside 16 bits; None for any number.
        keys_differ_from_values: whether keys and values may have different formats.
        own: formats that are the engine's own arithmetic, whose loss is known of what runs there; a
            search takes these and 16 bits, where there are some.
        stores_alike: whether each token is stored as it comes, the answer's like the prompt's, and
            the prompt is read through what is stored.
    """

    methods: frozenset[str]
    key_formats: frozenset[str]
    value_formats: frozenset[str]
    budgets: Scope
    formats: Scope
    distinct_budgets: int | None = None
    distinct_formats: int | None = None
    keys_differ_from_values: bool = True
    own: tuple[Format, ...] = ()
    stores_alike: bool = False

    def stores(self, keys: Format, values: Format) -> bool:
        """Whether a search may give a head these formats."""
        if self.own:
            named = all(form in self.own or form.name == "bf16" for form in (keys, values))
        else:
            named = keys.name in self.key_formats and values.name in self.value_formats
        return named and (self.keys_differ_from_values or keys == values)
