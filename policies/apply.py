"""The one driver of replay, live runs and the runtime: a policy applied to a layer's prompt.

    ask      every head's method, once for each choice that heads share (``kept.py``)
    store    what it names, gathered and passed through each head's formats (``storage.py``)
    account  the bytes, from what was really stored

Methods choose and formats store; here their choices meet the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from kvtune.policies.compressed import Compressed
from kvtune.policies.kept import Budgets, ask
from kvtune.policies.option import Option
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.policies.storage import store
from kvtune.policies.whole_tensors import kept_tokens, store_tokens


def linked(
    signals: Signals, options: Iterable[Option], layers: int, prompt: Callable[[int], Signals]
) -> Signals:
    """A layer's signals with the keys and values of the layer that a method links to it, if any.

    Args:
        signals: of the layer.
        options: of its heads, under one policy or several.
        layers: L.
        prompt: gives any layer's signals.
    """
    for method in dict.fromkeys(option.method for option in options):
        other = method.linked_layer(signals.layer, layers)
        if other is not None and 0 <= other < layers:
            read = prompt(other)
            return replace(signals, linked=(read.keys, read.values))
    return signals


def apply_together(
    policies: Sequence[Policy], layer: int, budgets: Budgets, signals: Signals
) -> Compressed:
    """One layer under several policies, ``[B, H, ...]``; ``budgets`` ``[B][H]`` are as planned."""
    rows = [policy.heads[layer] for policy in policies]
    final = [
        policy.split(layer, list(planned), signals)
        for policy, planned in zip(policies, budgets, strict=True)
    ]
    return store(rows, final, ask(rows, final, signals), signals)


def apply(policy: Policy, layer: int, budgets: Sequence[int], signals: Signals) -> Compressed:
    """One layer of one policy, ``[H, ...]``; changes nothing."""
    return apply_together([policy], layer, [budgets], signals).of_policy(0)


def apply_options(options: Sequence[Option], budget: int, signals: Signals) -> Compressed:
    """Each option on every head of a layer, ``[O, H, ...]``, all with one budget."""
    heads = len(signals.keys)
    rows = [(option,) * heads for option in options]
    budgets = [(budget,) * heads] * len(options)
    return store(rows, budgets, ask(rows, budgets, signals), signals)


def apply_each(
    options: Sequence[Option], budget: int, signals: Signals
) -> Iterator[tuple[list[int], Compressed]]:
    """Each option on every head of a layer, in batches; which options a batch holds comes with it.

    Those whose methods only drop tokens, equally many on every head, are gathered and stored as
    whole tensors: their heads need not be told apart.
    """
    methods = dict.fromkeys(option.method for option in options)
    kept = {m: tokens for m in methods if (tokens := kept_tokens(m, budget, signals)) is not None}
    sizes = {tokens.shape[-1] for tokens in kept.values()}
    for size in sizes:
        mine = {m: tokens for m, tokens in kept.items() if tokens.shape[-1] == size}
        columns = [at for at, option in enumerate(options) if option.method in mine]
        yield columns, store_tokens([options[at] for at in columns], mine, signals)
    if others := [at for at, option in enumerate(options) if option.method not in kept]:
        yield others, apply_options([options[at] for at in others], budget, signals)
