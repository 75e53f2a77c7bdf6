"""Where the runtime puts a head's parts: pages of 16 bits, of the option's format, or neither.

The rules are those of ``policies.placement``, by which memory is reserved before a prompt is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtune.common.errors import KvtuneError
from kvtune.policies.decode import DecodeMethod
from kvtune.policies.encoded_pages import is_read_in_place
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import exact_among, has_pages
from kvtune.policies.parts import HeadPart
from kvtune.policies.placement import chooses_entries, is_coded, is_exact, may_lie_on_host
from kvtune.policies.policy import Policy


@dataclass(frozen=True)
class Placed:
    """Where one head's parts go.

    Args:
        tokens: for pages, those in 16 bits first.
        exact: how many of them stay in 16 bits.
        newest: of these, how many settle when newer tokens come.
        merged: keys and values ``[n, D]`` to store instead of the tokens' own, or None.
        weights: ``[D]``, by which keys in pages are multiplied before they are coded, or None.
        beside: parts that pages cannot hold.
    """

    tokens: Tensor
    exact: int
    newest: int
    merged: tuple[Tensor, Tensor] | None
    weights: Tensor | None
    beside: list[HeadPart]


def warn_of_slow_formats(policy: Policy, head_dim: int, in_place: bool) -> None:
    """Say of which options a step reads something back from its packed buffers.

    Args:
        policy: of the cache.
        head_dim: D.
        in_place: whether kernels read packed buffers where they lie.
    """
    options = dict.fromkeys(policy.options())
    slow = [option.label for option in options if _is_slow(option, head_dim, in_place)]
    if slow:
        warnings.warn(
            f"{', '.join(slow)}: no kernel reads what these hold here; it is held encoded and "
            "read back at every step, which saves memory and takes time",
            stacklevel=3,
        )


def _is_slow(option: Option, head_dim: int, in_place: bool) -> bool:
    """Whether a step reads back some of an option: what layers share, or what no kernel reads."""
    plans = option.method.plan(PAGE, 2 * PAGE)
    if any(plan.shared_by > 1 for plan in plans):
        return True
    if has_pages(option, head_dim):
        return False
    return not in_place or not all(is_read_in_place(plan, option, head_dim) for plan in plans)


def check_host(option: Option, head_dim: int, evicts: bool) -> None:
    """Refuse an option that cannot keep its prompt on the host.

    Raises:
        KvtuneError: pages cannot hold all of it, or its entries leave while tokens are generated.
    """
    if not option.on_host:
        return
    if chooses_entries(option) and not may_lie_on_host(option, head_dim):
        raise KvtuneError(
            f"{option.label!r} chooses single tokens on the device, and would move all of them",
            hint="on the host pages are chosen (quest or landmark with block: 64), or an index is "
            "searched (retrieval_attention); leave out tier: host.",
        )
    if not may_lie_on_host(option, head_dim):
        raise KvtuneError(
            f"{option.label!r} stores more than pages of its formats hold",
            hint="only whole pages lie on the host; leave out tier: host, or take another format.",
        )
    if evicts and isinstance(option.method, DecodeMethod):
        raise KvtuneError(
            f"{option.label!r} cannot go on evicting on the host",
            hint="leave out evicts=True, or tier: host.",
        )


def place(parts: Sequence[HeadPart], option: Option, head_dim: int) -> Placed:
    """Divide one head's parts into what pages hold and what lies beside them."""
    if len(parts) == 1 and is_coded(parts[0].plan, option, head_dim):
        only = parts[0]
        tokens, exact_count, newest = _exact_first(option, only.tokens)
        both = None
        if only.keys is not None and only.values is not None:
            both = _exact_first(option, only.keys)[0], _exact_first(option, only.values)[0]
        return Placed(tokens, exact_count, newest, both, only.balance, [])
    own = [part for part in parts if part.keys is None]
    exact = [part for part in own if len(parts) > 1 and is_exact(part.plan, option)]
    coded = [part for part in own if part not in exact and is_coded(part.plan, option, head_dim)]
    paged = {id(part) for part in exact + coded}
    listed, front = [part.tokens for part in exact + coded], sum(len(x.tokens) for x in exact)
    newest = 0
    if coded:
        listed[len(exact)], count, newest = _exact_first(option, coded[0].tokens)
        front += count
    tokens = torch.cat([parts[0].tokens[:0], *listed])
    weights = coded[0].balance if coded else None
    beside = [part for part in parts if id(part) not in paged]
    return Placed(tokens, front, newest, None, weights, beside)


def _exact_first(option: Option, tokens: Tensor) -> tuple[Tensor, int, int]:
    """Tokens of a part, ``[n, ...]``, those in 16 bits first; how many they are, and the newest."""
    first, newest = exact_among(option.keys, len(tokens))
    if not newest:
        return tokens, first, 0
    last = len(tokens) - newest
    return torch.cat([tokens[:first], tokens[last:], tokens[first:last]]), first + newest, newest
