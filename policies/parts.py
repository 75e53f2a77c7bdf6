"""What a method makes of a layer's prompt: parts, each stored and read in one way.

A method that only drops tokens returns one part that names those that stay. Other systems need
more: two precisions within a head, an entry that stands for many tokens (with a log-weight), keys
and values that no token had, directions that two layers share. A ``Part`` says all of this for
every KV head of a layer; a ``PartPlan`` says the same without data, so that bytes can be planned
without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.policies.format import Format, Role

VIRTUAL = -1
"""The token index of an entry that is no token's own."""

_LOG_WEIGHT_BYTES = 4  # a float32 an entry
_BALANCE_BYTES = 2  # a 16-bit factor a channel
_NORM_BYTES = 2  # a 16-bit length of a key, and one of a value


@dataclass(frozen=True)
class PartPlan:
    """The size of one part of one KV head, known before the prompt has been read.

    Args:
        entries: keys and values stored.
        formats: the formats of keys and of values; those of the head's option where None.
        weighted: whether every entry carries a log-weight.
        balanced: whether keys are multiplied by a factor a channel before they are stored.
        shared_by: layers that store the directions of keys and values once between them; each
            adds the lengths of its own.
        turned: whether keys and values are rotated before they are stored, by matrices of the
            model's that take no bytes of a prompt.
    """

    entries: int
    formats: tuple[Format, Format] | None = None
    weighted: bool = False
    balanced: bool = False
    shared_by: int = 1
    turned: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether entries are keys and values alone, with nothing beside them or done to them."""
        changed = self.weighted or self.balanced or self.turned
        return not changed and self.shared_by == 1

    def stored_bytes(self, default: tuple[Format, Format], head_dim: int) -> tuple[int, int]:
        """Bytes of the keys and of the values, with everything that is stored beside them."""
        keys, values = self.formats or default
        entries, own_norms = self.entries, _NORM_BYTES * self.entries * (self.shared_by > 1)
        of_keys = -(-keys.bound(entries, head_dim, "keys") // self.shared_by) + own_norms
        of_values = -(-values.bound(entries, head_dim, "values") // self.shared_by) + own_norms
        beside = _LOG_WEIGHT_BYTES * entries * self.weighted
        beside += _BALANCE_BYTES * head_dim * (self.balanced and entries > 0)
        return of_keys + beside, of_values


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of every KV head of a layer that are stored and read alike.

    Args:
        tokens: ``[H, n]`` int64, ascending; ``VIRTUAL`` where an entry is no token's own.
        keys: ``[H, n, D]`` to store instead of the tokens' own; required where any is virtual.
        values: likewise.
        log_weight: ``[H, n]`` float32, added to the logits: an entry with the log-weight ``log(m)``
            draws as much attention as m tokens with its key.
        formats: of keys and of values; those of the head's option where None.
        balance: ``[H, D]``; keys are stored multiplied by it and read divided by it.
        shared_by: layers that store the directions of these keys and values once between them.
        turns: orthogonal matrices ``[H, D, D]`` of keys and of values, which are stored times them
            and read times their transposes.
    """

    tokens: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    log_weight: Tensor | None = None
    formats: tuple[Format, Format] | None = None
    balance: Tensor | None = None
    shared_by: int = 1
    turns: tuple[Tensor, Tensor] | None = None

    @property
    def plan(self) -> PartPlan:
        """Its size, as ``Method.plan`` must have foretold it."""
        weighted, balanced = self.log_weight is not None, self.balance is not None
        size, turned = self.tokens.shape[-1], self.turns is not None
        return PartPlan(size, self.formats, weighted, balanced, self.shared_by, turned)

    def of_head(self, head: int) -> HeadPart:
        """The entries of one KV head."""

        def at(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[head]

        own = (at(self.keys), at(self.values), at(self.log_weight), at(self.balance))
        turns = None if self.turns is None else (self.turns[0][head], self.turns[1][head])
        return HeadPart(self.tokens[head], *own, self.formats, self.shared_by, turns)


@dataclass(frozen=True, eq=False)
class HeadPart:
    """A ``Part`` of one KV head: ``tokens`` ``[n]``, ``keys`` ``[n, D]``, ``balance`` ``[D]``."""

    tokens: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    log_weight: Tensor | None = None
    balance: Tensor | None = None
    formats: tuple[Format, Format] | None = None
    shared_by: int = 1
    turns: tuple[Tensor, Tensor] | None = None

    @property
    def plan(self) -> PartPlan:
        """What is planned of the part before its tensors are known."""
        weighted, balanced = self.log_weight is not None, self.balance is not None
        size, turned = len(self.tokens), self.turns is not None
        return PartPlan(size, self.formats, weighted, balanced, self.shared_by, turned)

    def turn(self, role: Role) -> Tensor | None:
        """The matrix ``[D, D]`` of its keys or of its values."""
        return None if self.turns is None else self.turns[role == "values"]


def entries_of(plans: Iterable[PartPlan]) -> int:
    """Entries of all parts of a head."""
    return sum(plan.entries for plan in plans)
