"""How many of a serving engine's memory blocks a sequence takes under a plan; exact, without torch.

An engine hands out its cache memory in blocks of one size. Here a block holds pages of one size, so
that the number of blocks follows from the number of pages, and that from the plan and two lengths.
The scheduler and the worker ask the same object: what one admits the other can store.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvtune.policies.option import Option
from kvtune.policies.page_formats import BF16_PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import splits
from kvtune.policies.placement import pages_of, planned_entries
from kvtune.policies.policy import Policy
from kvtune.policies.servable import LEFT_TO_ANSWERS

AHEAD_TOKENS = 16
"""Pages are given to generated tokens so many at a time, for all heads at once."""

Ints = NDArray[np.int64]

_TYPICAL_PROMPT_TOKENS = 2048
_COUNTS_KEPT = 2**14
_BLOCK_CELLS = 384, 4096  # at least, at most: smaller ones are more than engines list quickly


@dataclass(frozen=True)
class SequencePages:
    """The pages of a sequence whose prompt had a certain length.

    Args:
        fixed: pages of the prompt's coded tokens, by their size in cells.
        exact: how many heads keep how many of the prompt's tokens in growing pages, ``(tokens,
            heads)`` pairs.
    """

    fixed: dict[int, int]
    exact: tuple[tuple[int, int], ...]

    def growing(self, new_tokens: int) -> int:
        """Pages of 16 bits that hold exact prompt tokens and so many tokens after the prompt."""
        return sum(heads * -(-(tokens + new_tokens) // BF16_PAGE) for tokens, heads in self.exact)


@dataclass(frozen=True)
class PlannedBlocks:
    """Counts blocks for a policy whose heads choose layer by layer.

    Args:
        policy: bound to the model.
        head_dim: D.
    """

    policy: Policy
    head_dim: int
    _known: dict[int, SequencePages] = field(default_factory=dict, repr=False, compare=False)
    _counted: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cell_bytes(self) -> int:
        """What places in memory are multiples of."""
        return PageLayout(self.head_dim).cell_bytes

    @cached_property
    def block_cells(self) -> int:
        """Cells of a block: a multiple of the layers that leaves least of a typical sequence over.

        Large blocks leave less over at their own ends, small ones at the ends of a sequence.
        """
        layers = self.policy.layers
        least, most = (-(-cells // layers) for cells in _BLOCK_CELLS)
        return min((layers * each for each in range(least, most + 1)), key=self._taken)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.block_cells * self.cell_bytes

    def sequence(self, prompt_tokens: int) -> SequencePages:
        """The pages of a sequence with such a prompt."""
        if prompt_tokens not in self._known:
            self._known[prompt_tokens] = self._sequence(prompt_tokens)
        return self._known[prompt_tokens]

    def blocks(self, prompt_tokens: int, tokens: int) -> int:
        """Blocks that a sequence holds; room for the first generated token is always part of it.

        Args:
            prompt_tokens: of its prompt, which was read in one piece.
            tokens: of all of it, prompt included.
        """
        # The first is part of it: else whoever is admitted is preempted at once.
        asked = prompt_tokens, with_room_ahead(max(tokens - prompt_tokens, 1))
        if asked not in self._counted:  # a scheduler asks for every request at every step
            if len(self._counted) >= _COUNTS_KEPT:
                self._counted.clear()
            self._counted[asked] = self._blocks(*asked, self.block_cells)
        return self._counted[asked]

    def _blocks(self, prompt_tokens: int, new: int, block_cells: int) -> int:
        sequence = self.sequence(prompt_tokens)
        pages = Counter(sequence.fixed)
        pages[PageLayout(self.head_dim).page_cells] += sequence.growing(new)
        return sum(-(-count // (block_cells // size)) for size, count in pages.items())

    def _taken(self, block_cells: int) -> int:
        """Cells that a typical sequence takes in blocks of this size."""
        prompt = _TYPICAL_PROMPT_TOKENS
        return block_cells * self._blocks(prompt, AHEAD_TOKENS, block_cells)

    def most_coded_pages(self, longest: int) -> int:
        """Pages of a layer in the prompt's formats, of a prompt of at most ``longest`` tokens."""
        budgets = self.policy.budgets(longest).reshape(self.policy.layers, -1)
        smallest = np.array([layout.page_tokens for layout in self.layouts])[self.kinds]
        smallest = smallest.reshape(budgets.shape)
        if self.spare:  # a layer's heads share its tokens
            return int((-(-budgets.sum(1) // smallest.min(1))).max()) + budgets.shape[1]
        return int((-(-budgets // smallest)).sum(1).max())

    @cached_property
    def spare(self) -> int:
        """Pages of each head that a split of a layer's tokens may need by rounding up."""
        return int(splits(self.policy))

    @cached_property
    def options(self) -> list[Option]:
        """The distinct options of the policy's heads."""
        return list(dict.fromkeys(self.policy.options()))

    @cached_property
    def layouts(self) -> list[PageLayout]:
        """The pages of each of these."""
        return [pages_of(option, self.head_dim) for option in self.options]

    @cached_property
    def kinds(self) -> Ints:
        """Which of the options each head has, layer by layer, ``[L * H]``."""
        numbers = {option: number for number, option in enumerate(self.options)}
        return np.array([numbers[option] for option in self.policy.options()], np.int64)

    def entries(self, kinds: Ints, budgets: Ints, prompt_tokens: int) -> tuple[Ints, Ints]:
        """Entries of a prompt in 16-bit pages that go on growing, and in pages of heads' formats.

        Args:
            kinds: of some heads.
            budgets: tokens of each.
            prompt_tokens: of the prompt.
        """
        pairs, heads = np.unique(np.stack([kinds, budgets]), axis=1, return_inverse=True)
        both = [
            planned_entries(self.options[kind], budget, prompt_tokens, self.head_dim)
            for kind, budget in pairs.T.tolist()
        ]
        exact, coded = np.array(both, np.int64).reshape(-1, 2)[heads].T
        return exact, coded

    @staticmethod
    def table_cells(layout: PageLayout) -> int:
        """Cells of the tables that a head's pages are read by; 0 where they have none."""
        return layout.tables.page_cells if layout.has_tables else 0

    def _sequence(self, prompt_tokens: int) -> SequencePages:
        budgets = self.policy.budgets(prompt_tokens).ravel()
        exact, coded = self.entries(self.kinds, budgets, prompt_tokens)
        fixed: Counter[int] = Counter()
        for kind, layout in enumerate(self.layouts):
            mine = coded[self.kinds == kind]
            fixed[layout.page_cells] += int((-(-mine // layout.page_tokens) + self.spare).sum())
            if tables := self.table_cells(layout):
                fixed[tables] += len(mine) if self.spare else int((mine > 0).sum())
        heads = zip(*(each.tolist() for each in np.unique(exact, return_counts=True)), strict=True)
        return SequencePages(dict(fixed), tuple(heads))


def with_room_ahead(new_tokens: int) -> int:
    """Generated tokens that have pages when so many are there."""
    return -(-new_tokens // AHEAD_TOKENS) * AHEAD_TOKENS


def left_to_answers(blocks: int) -> int:
    """Of so many blocks, those that a new request must leave to the answers of requests that run.

    Under a plan a prompt takes few blocks and its answer as many as ever, so that an engine that
    gives its last block to a new prompt soon preempts others, whose prompts are then read again.
    """
    return int(LEFT_TO_ANSWERS * blocks)
