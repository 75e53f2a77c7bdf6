"""A policy: what is done to every KV head of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.policies.allocator import Allocator
from kvtune.policies.allocators.as_given import AsGiven
from kvtune.policies.option import Ledger, Option
from kvtune.policies.signals import Needs, Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LENGTH_BYTES = 4  # an int32 a KV head: ragged heads must know their length


def label_of(option: Option, allocator: Allocator) -> str:
    """``snapkv+adakv 25% int4``: an option for all heads, and what splits its budgets anew."""
    if isinstance(allocator, AsGiven):
        return option.label
    method = option.method.label
    return f"{method}+{allocator.name}{option.label.removeprefix(method)}"


@dataclass(frozen=True)
class Policy:
    """An option for every (layer, KV head), and the allocator that may move budgets.

    Args:
        name: for tables and plots.
        heads: options, ``[L][H]``.
        allocator: re-splits the options' budgets; as given unless said.
    """

    name: str
    heads: tuple[tuple[Option, ...], ...]
    allocator: Allocator = AsGiven()

    @staticmethod
    def uniform(
        option: Option,
        layers: int,
        kv_heads: int,
        *,
        name: str = "",
        allocator: Allocator | None = None,
    ) -> Policy:
        """The same option everywhere."""
        heads = ((option,) * kv_heads,) * layers
        allocator = allocator or AsGiven()
        return Policy(name or label_of(option, allocator), heads, allocator)

    @property
    def layers(self) -> int:
        """How many layers the policy is for, L."""
        return len(self.heads)

    @property
    def kv_heads(self) -> int:
        """How many KV heads each layer has, H."""
        return len(self.heads[0])

    def options(self) -> Iterator[Option]:
        """All options, layer by layer."""
        return (option for layer in self.heads for option in layer)

    @property
    def needs(self) -> Needs:
        """The signals that its methods and its allocator read."""
        needs = self.allocator.needs
        for option in dict.fromkeys(self.options()):
            needs |= option.method.needs
        return needs

    @property
    def waits(self) -> bool:
        """Whether it chooses no earlier than when all layers have read the prompt.

        Until then a prompt's whole cache is held uncompressed.
        """
        compares_layers = type(self.allocator).settle is not Allocator.settle
        return self.needs.asks_model or compares_layers or self.needs.linked

    def check_allocator(self) -> None:
        """Refuse an allocator that cannot split budgets between the heads' methods."""
        self.allocator.check([[option.method for option in layer] for layer in self.heads])

    def check_fits(self, layers: int, kv_heads: int) -> None:
        """Refuse a policy made for another model's shape."""
        ragged = {len(layer) for layer in self.heads}
        self._check_links()
        if self.layers != layers or ragged != {kv_heads}:
            ours = "/".join(map(str, sorted(ragged)))
            raise KvtuneError(
                f"the policy {self.name!r} is for {self.layers} layers of {ours} KV heads, "
                f"the model has {layers} of {kv_heads}",
                hint="search again for this model, or give the policy a uniform option.",
            )

    def _check_links(self) -> None:
        """Refuse a method that shares storage with a layer that does not share it back."""
        for layer, options in enumerate(self.heads):
            for head, option in enumerate(options):
                other = option.method.linked_layer(layer, self.layers)
                if other is None:
                    continue
                if not 0 <= other < self.layers or self.heads[other][head] != option:
                    raise KvtuneError(
                        f"the policy {self.name!r} links layer {layer}, KV head {head} to layer "
                        f"{other}, which has another option or does not exist",
                        hint=f"give {option.method.name} to both layers of a pair.",
                    )

    def budgets(self, prompt_tokens: int) -> NDArray[np.int64]:
        """Tokens each head may keep, ``[L, H]``, as far as it is known before the prompt."""
        import numpy as np

        given = [[o.budget.resolve(prompt_tokens) for o in layer] for layer in self.heads]
        return self.allocator.plan(np.array(given, np.int64), prompt_tokens)

    def settle(self, prompt_tokens: int, prompt: Callable[[int], Signals]) -> NDArray[np.int64]:
        """Tokens each head may keep, ``[L, H]``, when the whole model has seen the prompt.

        Args:
            prompt_tokens: P.
            prompt: gives a layer's signals; most allocators do not ask.
        """
        methods = [[option.method for option in layer] for layer in self.heads]
        return self.allocator.settle(self.budgets(prompt_tokens), methods, prompt)

    def split(self, layer: int, budgets: list[int], signals: Signals) -> list[int]:
        """One layer's budgets ``[H]`` when its prompt has been seen."""
        return self.allocator.split(budgets, [o.method for o in self.heads[layer]], signals)

    @property
    def compares_layers(self) -> bool:
        """Whether its allocator waits for the whole prompt: ``settle`` may then ask for layers."""
        return type(self.allocator).settle is not Allocator.settle

    def chooses_head_by_head(self, layer: int) -> bool:
        """Whether no head's choice depends on other heads, or on which head it is."""
        alone = all(option.method.chooses_head_by_head for option in self.heads[layer])
        return alone and type(self.allocator).split is Allocator.split

    def footprint(self, prompt_tokens: int, head_dim: int) -> int:
        """Bytes of the compressed prompt on the device: codes, scales and a length a head.

        Runs without torch. What lies on the host is ``host_bytes``.
        An allocator that waits for the prompt keeps the sum of tokens; the bytes are then those
        of the budgets before it.
        """
        return footprint(self, self.budgets(prompt_tokens), prompt_tokens, head_dim)

    def read_bytes(self, prompt_tokens: int, head_dim: int) -> int:
        """Bytes of the compressed prompt that a decode step reads; as far as ``footprint`` knows.

        Less than the footprint where heads have readers.
        """
        payload = sum(each.read_bytes for each in self._ledgers(prompt_tokens, head_dim))
        return payload + footprint_of_lengths(self.layers, self.kv_heads)

    def host_bytes(self, prompt_tokens: int, head_dim: int) -> int:
        """Bytes of the compressed prompt that lie in the host's memory."""
        return sum(each.host_bytes for each in self._ledgers(prompt_tokens, head_dim))

    def moved_bytes(self, prompt_tokens: int, head_dim: int) -> int:
        """Bytes that a decode step copies from the host to the device."""
        return sum(each.moved_bytes for each in self._ledgers(prompt_tokens, head_dim))

    @property
    def uses_host(self) -> bool:
        """Whether any head's prompt lies in the host's memory."""
        return any(option.on_host for option in self.options())

    def _ledgers(self, prompt_tokens: int, head_dim: int) -> Iterator[Ledger]:
        planned = zip(self.options(), self.budgets(prompt_tokens).flat, strict=True)
        return (o.ledger(int(budget), prompt_tokens, head_dim) for o, budget in planned)


def footprint(policy: Policy, budgets: NDArray[np.int64], prompt_tokens: int, head_dim: int) -> int:
    """Bytes of a policy whose heads have these final budgets ``[L, H]``; exact."""
    planned = zip(policy.options(), budgets.flat, strict=True)
    payload = sum(o.footprint(int(budget), prompt_tokens, head_dim) for o, budget in planned)
    return payload + footprint_of_lengths(policy.layers, policy.kv_heads)


def footprint_of_lengths(layers: int, kv_heads: int) -> int:
    """Bytes that a ragged cache takes to know each head's length."""
    return _LENGTH_BYTES * layers * kv_heads
