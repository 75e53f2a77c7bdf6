"""Heads whose reader chooses entries in another way than by pages: votes, searches, sentences.

What such a head stores lies beside the pages, as its formats encode it. At every step the reader is
shown all of it and the queries, as replay shows them; what it chooses is gathered, attended to, and
joined to attention over the pages by its log-sum-exp. Where the head lies on the host, the search
runs there on the host's own copy, and only what was found comes over. A step waits for the host, so
that no graph captures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtune.policies.attention import attend
from kvtune.policies.gathering import of_tokens
from kvtune.policies.option import Option
from kvtune.policies.parts import HeadPart
from kvtune.policies.placement import EXACT, reads_pages
from kvtune.policies.reader import Held, Memory, Reader
from kvtune.policies.signals import Needs, Signals
from kvtune.runtime.cache.beside import HeldPart, stacked


class EntryRows:
    """Rows of a layer that share a reader and the signals of the prompt that they were read with.

    Args:
        reader: chooses.
        held: what each row stores, one part a row.
        tokens: the prompt token of each entry, of each row.
        heads: the row of the signals that each row is.
        sequences: of each row.
        signals: of the layer's prompt, on the device that the reader works on.
        on_host: whether the rows lie on the host, where the reader then works.
    """

    def __init__(
        self,
        reader: Reader,
        held: Sequence[HeldPart],
        tokens: Sequence[Tensor],
        heads: Sequence[int],
        sequences: Sequence[int],
        signals: Signals,
        on_host: bool,
    ) -> None:
        device = signals.keys.device
        self.reader, self.signals, self.head_dim = reader, signals, signals.keys.shape[-1]
        self.rows = torch.tensor([each.row for each in held], device=device)
        self.heads = torch.tensor(heads, device=device)
        self.sequences = _numbered(torch.tensor(sequences, device=device))
        self.tokens = pad_sequence(list(tokens), batch_first=True).to(device)
        self.counts = torch.tensor([len(each) for each in tokens], device=device)
        self.memory: Memory = {}  # the reader's
        self.steps, self.on_host = 0, on_host
        self.sentence_ends: Callable[[], Tensor] | None = None  # for readers that go by them
        dense = all(each.formats == EXACT for each in held)
        self.encoded = [] if dense else list(held)
        self.dense = stacked(held, self.head_dim, torch.bfloat16, device) if dense else None

    @staticmethod
    def of(
        reader: Reader,
        rows: Sequence[tuple[int, int]],
        options: Sequence[Option],
        parts: Sequence[Sequence[HeadPart]],
        signals: Signals,
        on_host: bool,
    ) -> EntryRows:
        """Encode what some rows store.

        Args:
            reader: of all of them.
            rows: each with the head of the signals that it is.
            options: one a KV head.
            parts: of every head of the signals.
            signals: of the layer's prompt, or of several side by side.
            on_host: whether they lie there.
        """
        device = torch.device("cpu") if on_host else signals.keys.device
        own = signals.keys.to(device), signals.values.to(device)
        needs = reduce(or_, (options[row % len(options)].method.needs for row, _ in rows))
        held = [
            HeldPart.of(
                row, moved(part, device), (own[0][head], own[1][head]), options[row % len(options)]
            )
            for row, head in rows
            for part in parts[head]
        ]
        tokens = [torch.cat([part.tokens for part in parts[head]]) for _, head in rows]
        sequences = [row // len(options) for row, _ in rows]
        shown = replace(
            signals,
            queries=asked_of(signals, needs).to(device),
            keys=own[0],
            values=own[1][:, :0].clone(),
            _memo={},
        )
        return EntryRows(reader, held, tokens, [n for _, n in rows], sequences, shown, on_host)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values stored."""
        if self.dense is not None:
            return sum(x.nbytes for x in self.dense[1:3])
        return sum(x.encoded.keys.nbytes + x.encoded.values.nbytes for x in self.encoded)

    def free(self, rows: range) -> None:
        """Forget these rows: what they store, and how they were read.

        What several rows share, the prompts' signals and an index made of them, goes with the last.
        """
        stays = (self.rows < rows.start) | (self.rows >= rows.stop)
        self.rows, self.heads, self.sequences, self.tokens, self.counts = (
            x[stays] for x in (self.rows, self.heads, self.sequences, self.tokens, self.counts)
        )
        self.sequences = _numbered(self.sequences)
        self.memory = {name: _kept(each, stays) for name, each in self.memory.items()}
        if self.dense is not None:
            number, keys, values, weights = (x[stays] for x in self.dense)
            self.dense = number, keys, values, weights
        self.encoded = [each for each in self.encoded if each.row not in rows]
        if not len(self.rows):
            self.signals = without_prompt(replace(self.signals, _memo={}))

    def attend(self, q: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention of one step over what the reader chooses.

        Args:
            q: of all rows of the layer, ``[rows, G, D]``.
            scale: multiplies the logits.

        Returns:
            The rows' numbers ``[R]``, output ``[R, G, D]`` and log-sum-exp ``[R, G]``, beside q.
        """
        asking = q.index_select(0, self.rows.to(q.device)).float()
        keys, values, weights = self._chosen(asking.to(self.rows.device))
        visible, near = weights > -torch.inf, q.device
        output, lse = attend(
            asking, keys.to(near), values.to(near), visible.to(near), scale, weights.to(near)
        )
        # A row that holds nothing reads nothing anywhere, and no weight may become 0 / 0.
        return self.rows.to(near), (output, lse.clamp_min(torch.finfo(lse.dtype).min))

    def _chosen(self, asking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[R, k, D]`` that this step reads, and their log-weights ``[R, 1, k]``;
        minus infinity where a row reads fewer than k."""
        _, keys, values, weights = self.dense or stacked(
            self.encoded, self.head_dim, torch.float32, self.rows.device
        )
        flags = self._read(keys.float(), asking)
        there, at = flags.int().topk(self.reader.most_read(flags.shape[1], self.steps - 1), -1)
        keys, values = of_tokens(keys, at), of_tokens(values, at)
        weights = weights.gather(2, at[:, None]).masked_fill(there[:, None] == 0, -torch.inf)
        return keys.float(), values.float(), weights

    def _read(self, keys: Tensor, asking: Tensor) -> Tensor:
        """Which entries this step reads, ``[R, n]`` bool."""
        if self.sentence_ends is not None:
            self.signals.sentence_ends = self.sentence_ends().to(keys.device)
        start = self.signals.prompt_tokens + self.steps
        held = Held(keys, self.counts, self.tokens, self.heads, self.sequences, self.signals, start)
        chosen = self.reader.follow(held, asking[:, :, None], self.memory) & held.real
        if self.steps == 0 and type(self.reader).follow is not Reader.follow:
            self.signals = without_prompt(self.signals)
        self.steps += 1
        return chosen


def _numbered(sequences: Tensor) -> Tensor:
    """The same sequences numbered from 0 on."""
    numbers: Tensor = sequences.unique(return_inverse=True)[1]
    return numbers


def _kept(remembered: Tensor | Sequence[Any], stays: Tensor) -> Tensor | list[Any]:
    """What is remembered of the rows that stay."""
    if isinstance(remembered, Tensor):
        return remembered[stays]
    return [each for each, stay in zip(remembered, stays.tolist(), strict=True) if stay]


def searches(reader: Reader | None) -> bool:
    """Whether a reader chooses in another way than by pages."""
    return reader is not None and not reads_pages(reader)


def asked_of(signals: Signals, needs: Needs) -> Tensor:
    """The last queries of a prompt that are needed, without the memory of the others."""
    count = needs.queries(signals.prompt_tokens)
    queries = signals.queries
    if count == signals.prompt_tokens:
        return queries
    return queries[:, max(queries.shape[1] - count, 0) :].clone()


def without_prompt(signals: Signals) -> Signals:
    """The same length and what was made of the prompt, without its queries and keys."""
    queries, keys = (x[..., :0].clone() for x in (signals.queries, signals.keys))
    return replace(signals, queries=queries, keys=keys)


def moved(part: HeadPart, device: torch.device) -> HeadPart:
    """The same part on another device."""
    keys, values = (None if x is None else x.to(device) for x in (part.keys, part.values))
    return replace(part, tokens=part.tokens.to(device), keys=keys, values=values)
