"""A shortcut for methods that only drop tokens: all heads are gathered and stored as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvtune.policies.compressed import Compressed
from kvtune.policies.format import Format, Role
from kvtune.policies.method import Method
from kvtune.policies.option import Option
from kvtune.policies.parts import PartPlan
from kvtune.policies.signals import Signals


def kept_tokens(method: Method, budget: int, signals: Signals) -> Tensor | None:
    """The tokens ``[H, n]`` that a method keeps, where that is all it does; None otherwise.

    Whether it is is known without asking: what a method fits to a prompt may take long, and is
    asked for elsewhere.
    """
    if not method.only_drops or method.reader(budget) is not None:
        return None
    tokens = method.keep(signals, budget)
    return tokens if tokens.shape[-1] else None


def store_tokens(
    options: Sequence[Option], kept: Mapping[Method, Tensor], signals: Signals
) -> Compressed:
    """Options of methods that only drop tokens, ``[O, H, n, D]``; each format stores once."""
    tokens = torch.stack(list(kept.values()))  # [M, H, n]
    lead, (size, head_dim) = tokens.shape[:2], (tokens.shape[-1], signals.keys.shape[-1])
    counts = torch.full((lead[0] * lead[1],), size, device=tokens.device)
    row_of = {method: row for row, method in enumerate(kept)}
    rows = [row_of[option.method] for option in options]
    prompt = signals.keys.shape[-2]
    first = torch.arange(lead[1], device=tokens.device)[:, None] * prompt
    places = (tokens + first).flatten()

    def stored(whole: Tensor, forms: Sequence[Format], role: Role) -> Tensor:
        plain = whole.flatten(0, 1).index_select(0, places).view(-1, size, head_dim)
        back = {
            form: form.roundtrip(plain, counts, role).float().unflatten(0, lead)
            for form in dict.fromkeys(forms)
        }
        return torch.stack([back[form][row] for form, row in zip(forms, rows, strict=True)])

    each = [
        PartPlan(size).stored_bytes((option.keys, option.values), head_dim) for option in options
    ]
    return Compressed(
        stored(signals.keys, [option.keys for option in options], "keys"),
        stored(signals.values, [option.values for option in options], "values"),
        torch.full((len(options), lead[1]), size, device=tokens.device),
        tuple(lead[1] * sum(both) for both in each),
        padded=False,
    )
