"""What a layer gathers while its prompts are read, one after another, until all of them are stored.

Pages take most of it at once. What the rest is made of, tables of all rows together, waits here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.placement import reads_pages
from kvtune.policies.reader import BlockReader, Reader
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.beside import Beside, HeldPart, LaidPart, Shared
from kvtune.runtime.cache.choosing import Choice
from kvtune.runtime.cache.coded_evicting import evictors
from kvtune.runtime.cache.entry_rows import EntryRows, searches
from kvtune.runtime.cache.evicting import Evictor, Opening, openings
from kvtune.runtime.cache.host_rows import EveryPage
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.segments import CODED, Ints
from kvtune.runtime.cache.selecting import Indexed, indexed
from kvtune.runtime.cache.sliding import Ring, places_of


@dataclass(frozen=True)
class Taken:
    """Prompts that a layer has read together.

    Args:
        layer: whose pages hold what is kept of them.
        rows: of the layer, theirs.
        read: their signals; of one that stands for all of them where there are fewer.
        choices: what is kept, for each of ``read``.
    """

    layer: PagedLayer
    rows: slice
    read: Sequence[Signals]
    choices: Sequence[Choice]

    @property
    def sequences(self) -> range:
        """The numbers of the sequences that were read."""
        heads = len(self.layer.options)
        return range(self.rows.start // heads, self.rows.stop // heads)

    @property
    def readers(self) -> list[Reader | None]:
        """Of each head that was read."""
        return [reader for choice in self.choices for reader in choice.readers]

    @property
    def kept(self) -> list[Tensor]:
        """Tokens of each head that was read."""
        return [tokens for choice in self.choices for tokens in choice.kept]


@dataclass
class Filling:
    """What has been gathered of the sequences read so far.

    Args:
        shared: directions that two layers store once.
        layers: of the model.
        window: of a sliding layer that will be exceeded.
        evicts: whether methods that can go on evicting will.
        sentence_ends: which tokens of a sequence end a sentence, as far as it was given.
    """

    shared: Shared
    layers: int
    window: int | None
    evicts: bool
    sentence_ends: Callable[[int], Tensor]
    _beside: list[HeldPart] = field(default_factory=list)
    _laid: list[LaidPart] = field(default_factory=list)
    _searched: list[EntryRows] = field(default_factory=list)
    _indexed: list[Indexed] = field(default_factory=list)
    _on_host: dict[PageLayout, list[Indexed]] = field(default_factory=dict)
    _places: list[Ints] = field(default_factory=list)
    _openings: list[Opening] = field(default_factory=list)

    def take(self, taken: Taken) -> None:
        """Gather from prompts whose kept tokens are in pages."""
        if self.window:
            self._take_places(taken, self.window)
        self._take_beside(taken)
        self._take_searched(taken)
        self._take_readers(taken)
        if self.evicts and not self.window:
            self._take_openings(taken)

    def finish(self, layer: PagedLayer, head_dim: int) -> list[Evictor]:
        """Completes the layer when all prompts are read; returns what evicts from its pages."""
        if self._places:
            layer.ring = Ring(np.concatenate(self._places))
        if self._beside or self._laid:
            layer.beside = Beside(
                self._beside, self._laid, head_dim, layer.pool, layer.backend.has_kernels
            )
        layer.searched = self._searched
        layer.indexed = _joined(self._indexed)
        if layer.host is not None:
            layer.host.indexed = [
                (layout, each) for layout, parts in self._on_host.items() for each in _joined(parts)
            ]
            if not layer.host.indexed:  # a sliding layer keeps its window on the device
                layer.host = None
        return evictors(self._openings, layer)

    def _take_places(self, taken: Taken, window: int) -> None:
        tokens = [signals.prompt_tokens for signals in taken.read for _ in signals.keys]
        places = places_of(taken.kept, tokens, window)
        rows = taken.rows.stop - taken.rows.start
        self._places.append(np.resize(places, (rows, window)))

    def _take_beside(self, taken: Taken) -> None:
        """Encode what pages cannot hold, of every row."""
        if not any(parts for choice in taken.choices for parts in choice.beside):
            return
        rows = [
            (parts, (signals.keys[head], signals.values[head]))
            for signals, choice in zip(taken.read, taken.choices, strict=True)
            for head, parts in enumerate(choice.beside)
        ]
        options, layer, readers = taken.layer.options, taken.layer.number, taken.readers
        for row in range(taken.rows.start, taken.rows.stop):
            at = (row - taken.rows.start) % len(rows)
            parts, own = rows[at]
            if searches(readers[at]):
                continue
            sequence, head = divmod(row, len(options))
            other = options[head].method.linked_layer(layer, self.layers)
            first = min(layer, layer if other is None else other)
            for part in parts:
                shared = (self.shared, (sequence, head, first)) if part.shared_by > 1 else None
                held = HeldPart.of(row, part, own, options[head], shared)
                if held.is_dense or shared:
                    self._beside.append(held)
                else:
                    self._laid.append(LaidPart.of(held, taken.layer.pool, own[0].shape[-1]))

    def _take_searched(self, taken: Taken) -> None:
        """Rows whose readers choose no pages: those of one reader and prompt together."""
        options, together = taken.layer.options, defaultdict[Any, list[tuple[int, int]]](list)
        places = [(n, head) for n, each in enumerate(taken.choices) for head in each.heads]
        for row in range(taken.rows.start, taken.rows.stop):
            number, head = places[(row - taken.rows.start) % len(places)]
            reader = taken.choices[number].readers[head]
            if searches(reader):
                option = options[row % len(options)]
                # What a sequence writes is its own, also where one prompt stands for several.
                own = row // len(options) if option.method.needs.sentences else None
                together[number, reader, option.on_host, own].append((row, head))
        for (number, reader, on_host, own), rows in together.items():
            parts = taken.choices[number].beside
            found = EntryRows.of(reader, rows, options, parts, taken.read[number], on_host)
            if own is not None:
                found.sentence_ends = partial(self.sentence_ends, own)
            self._searched.append(found)

    def _take_readers(self, taken: Taken) -> None:
        """Index keys for readers, as pages hold them."""
        layer, readers = taken.layer, self._readers(taken)
        if not readers:
            return
        of_rows = [(signals, head) for signals in taken.read for head in range(len(signals.keys))]
        keys: dict[int, Tensor] = {}
        for row in readers:
            at = (row - taken.rows.start) % len(of_rows)
            signals, head = of_rows[at]
            own = signals.keys[head, taken.kept[at][int(layer.exact[row]) :]]
            form = layer.options[row % len(layer.options)].keys.coded
            count = torch.tensor([len(own)], device=own.device)
            keys[row] = form.roundtrip(own[None], count, "keys")[0]
        layer.readers |= readers
        here = {row: reader for row, reader in readers.items() if not layer.on_host[row]}
        self._indexed += indexed(here, keys)
        for layout in dict.fromkeys(layer.layouts):
            there = {
                row: reader
                for row, reader in readers.items()
                if layer.on_host[row] and layer.layouts[row] == layout
            }
            self._on_host.setdefault(layout, []).extend(indexed(there, keys))

    def _readers(self, taken: Taken) -> dict[int, BlockReader]:
        """The reader of each row that has one, or whose pages come over from the host."""
        layer, readers = taken.layer, taken.readers
        found: dict[int, BlockReader] = {}
        for row in range(taken.rows.start, taken.rows.stop):
            reader = readers[(row - taken.rows.start) % len(readers)]
            if reader is None and layer.on_host[row]:
                reader = EveryPage(PAGE, -(-int(layer.lengths[CODED, row]) // PAGE))
            if isinstance(reader, BlockReader) and reads_pages(reader):
                found[row] = reader
        return found

    def _take_openings(self, taken: Taken) -> None:
        for number, sequence in enumerate(taken.sequences):
            at = number % len(taken.read)
            choice, signals = taken.choices[at], taken.read[at]
            self._openings += openings(
                taken.layer.options, choice.rooms, sequence, choice.kept, signals
            )


def _joined(parts: Sequence[Indexed]) -> list[Indexed]:
    """One index a reader; behind the shorter ones is what no row selects."""
    found = []
    for reader in dict.fromkeys(part.reader for part in parts):
        mine = [part for part in parts if part.reader == reader]
        index = pad_sequence([row for part in mine for row in part.index], batch_first=True)
        rows = [row for part in mine for row in part.rows]
        found.append(Indexed(reader, rows, index, torch.cat([part.counts for part in mine])))
    return found
