"""What is asked of a search: tables of losses, the room for caches, and what limits a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.export.limits import EngineLimits
from kvtune.policies.host_pages import landing_bytes
from kvtune.policies.option import Option
from kvtune.policies.paging import waiting_bytes
from kvtune.policies.policy import footprint_of_lengths
from kvtune.simulator.memory.peak import most_at_once
from kvtune.simulator.quality.tables import Tables
from kvtune.tuner.exchange import Choice
from kvtune.tuner.limits import Excess, no_limits
from kvtune.tuner.linked import PAIRS, holds_whole_prompt, is_linked
from kvtune.tuner.within import expressible, format_label, is_narrow, splits_of


@dataclass(frozen=True)
class Question:
    """What is fixed before the study: the room for caches and what is asked of it.

    Args:
        tables: quality of options on the model, every split.
        head_dim: of the model that will run, which a stand-in's tables may differ from.
        rooms: bytes left for all sequences' caches and for what the runtime works with, by the
            context P of a sequence in tokens; of several contexts the study chooses.
        held: bytes that one head's prompt takes in pages under each option, and under each rule
            behind them, ``[O + rules]``, by context.
        generated_bytes: that each sequence's generated tokens take in pages of 16 bits.
        working: bytes that the runtime works with, for a context and so many sequences.
        sequences: how many at once; None lets the study choose.
        limits: of the stack that the plan is for; None for any plan.
        most_read: bytes that a decode step may read of each sequence's prompt; None for any.
        excess: by which share of each limit on its cost a candidate is beyond it.
        most_moved: bytes that it may bring over from the host, likewise; one of the two at most.
        freed: bytes that each format of the weights leaves beyond ``rooms``, widest format first,
            whose 0 they are; of several formats the study chooses.
        bytes_there: that a stack which counts otherwise holds of one sequence of a choice, at a
            context; None for kvtune's own pages.
    """

    tables: Tables
    head_dim: int
    rooms: Mapping[int, int]
    held: Mapping[int, NDArray[np.int64]]
    generated_bytes: int
    working: Callable[[int, int], int]
    sequences: int | None = None
    limits: EngineLimits | None = None
    most_read: int | None = None
    excess: Excess = no_limits
    most_moved: int | None = None
    freed: Mapping[str, int] = field(default_factory=lambda: {"": 0})
    bytes_there: Callable[[Choice, int], int] | None = None

    @property
    def weights(self) -> str:
        """The format of the weights; the widest, where the study chooses."""
        return next(iter(self.freed))

    def under(self, weights: str) -> Question:
        """The same question where the weights have one format."""
        freed = self.freed[weights]
        rooms = {context: room + freed for context, room in self.rooms.items()}
        return replace(self, rooms=rooms, freed={weights: freed})

    @property
    def objectives(self) -> tuple[Literal["minimize", "maximize"], ...]:
        """Loss, then tokens at once and what the weights freed, each where the study chooses it.

        What narrower weights lose is not known here. A plan that needs them is therefore no better
        than one that serves less and does not: the bytes that they free count against it.
        """
        serves_more = self.sequences is None or len(self.contexts) > 1
        return (
            "minimize",
            *(("maximize",) if serves_more else ()),
            *(("minimize",) if len(self.freed) > 1 else ()),
        )

    @property
    def options(self) -> list[Option]:
        """The tables' options that the stack can express."""
        return [option for option in self.tables.options if expressible(option, self.limits)]

    @property
    def splits(self) -> tuple[str, ...]:
        """What may choose for itself: heads, layers, the engine as a whole, or pairs of layers."""
        linked = any(is_linked(option) for option in self.options)
        return (*splits_of(self.limits), PAIRS) if linked else splits_of(self.limits)

    @property
    def narrow_formats(self) -> list[str]:
        """Formats of which a plan may have one beside 16 bits; empty where it may have any."""
        if self.limits is None or self.limits.distinct_formats != 1:
            return []
        return sorted({format_label(option) for option in self.options if is_narrow(option)})

    @property
    def contexts(self) -> list[int]:
        """Those that the study may choose, shortest first."""
        return sorted(self.rooms)

    def full_bytes(self, context: int) -> int:
        """Bytes of one uncompressed prompt, bf16."""
        return 2 * 2 * context * self.head_dim * self.tables.heads

    def most_of(self, context: int, choice: Choice) -> int:
        """As many sequences of a choice as fit at once, as ``MemoryPlan`` counts of its policy.

        Of a plan for another stack as its exporter lays a sequence out.
        """
        rule = self.tables.rule_of(choice)
        waits = (
            rule.policy(1, 1).waits
            if rule is not None
            else any(holds_whole_prompt(option) for option in self.tables.given(choice))
        )
        each = self._there(context, choice)
        if each is None:
            each = int(self.held[context][choice].sum()) + self.generated_bytes
            each += self._landing(context, choice)
        return most_at_once(each, lambda count: self._room(context, count, waits))

    def _there(self, context: int, choice: Choice) -> int | None:
        return None if self.bytes_there is None else self.bytes_there(choice, context)

    def _room(self, context: int, sequences: int, waits: bool) -> int:
        """Bytes for the caches of so many sequences."""
        room = self.rooms[context] - self.working(context, sequences)
        waiting = waiting_bytes(self.full_bytes(context), self.tables.layers) if waits else 0
        return room - waiting

    def _landing(self, context: int, choice: Choice) -> int:
        """Bytes where pages from the host land, of one sequence."""
        if self.most_moved is None or self.tables.rule_of(choice) is not None:
            return 0
        rows = np.unique(choice.reshape(-1, self.tables.kv_heads), axis=0)  # few differ
        layers = [[self.tables.options[o] for o in row] for row in rows]
        return landing_bytes(layers, context, self.head_dim)

    def most_landing(self, context: int) -> int:
        """The most that those may be of any choice that brings over no more than it may."""
        if self.most_moved is None:
            return 0
        heads = self.tables.kv_heads
        each = max(landing_bytes([heads * [o]], context, self.head_dim) for o in self.options)
        return min(each, 2 * self.most_moved)

    def prompt_budget(self, context: int, sequences: int, waits: bool = False) -> int:
        """Bytes that the pages of each sequence's compressed prompt may take.

        The most that where its pages from the host land may take comes off too.

        Args:
            context: prompt tokens.
            sequences: at once.
            waits: whether a policy may wait for a prompt's end, all layers of one uncompressed.
        """
        each = self._room(context, sequences, waits) // sequences
        return each - self.generated_bytes - self.most_landing(context)

    @property
    def read_budget(self) -> int | None:
        """What a solution may take of ``taken``: of ``most_read`` without the heads' lengths."""
        if self.most_moved is not None:
            return self.most_moved
        lengths = footprint_of_lengths(1, self.tables.heads)
        return None if self.most_read is None else max(self.most_read - lengths, 0)

    def taken(self, context: int) -> NDArray[np.int64]:
        """Bytes of one head that ``read_budget`` counts, ``[O]``: moved over, or else read."""
        counted = self.tables.bytes_read if self.most_moved is None else self.tables.bytes_moved
        return counted(context, self.head_dim)

    def most_sequences(self, context: int) -> int:
        """As many as fit with every head on its smallest option."""
        allowed = [expressible(option, self.limits) for option in self.tables.options]
        held = np.where(allowed, self.held[context][: len(allowed)], np.iinfo(np.int64).max)
        smallest = np.full(self.tables.heads, int(held.argmin()), np.int64)
        return self.most_of(context, smallest)

    def most_within_reads(self, context: int) -> int:
        """The most that fit of one option for all heads that reads, or moves, as little as asked.

        0 where every option takes more, or fits not once.
        """
        heads, most = self.tables.heads, self.read_budget
        taken, counts = self.taken(context), [0]
        for number, option in enumerate(self.tables.options):
            reads_little = most is None or heads * int(taken[number]) <= most
            if reads_little and expressible(option, self.limits):
                counts.append(self.most_of(context, np.full(heads, number, np.int64)))
        return max(counts)
