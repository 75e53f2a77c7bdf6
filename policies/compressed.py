"""A layer's compressed prompt, as attention reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtune.policies.attention import attend
from kvtune.policies.reader import Held, Reader
from kvtune.policies.signals import Signals


@dataclass(frozen=True)
class Compressed:
    """One layer's prompt as attention sees it, under one policy ``[H, ...]`` or several ``[B, H]``.

    A head's parts lie one behind the other.

    Args:
        keys: ``[..., H, n, D]``, read back from storage; of a row the first ``counts`` are real.
        values: ``[..., H, n, D]``.
        counts: ``[..., H]`` int64.
        footprint_bytes: what all heads hold, of each policy.
        log_weight: ``[..., H, n]`` float32, added to the logits; None where there is none.
        readers: rows, counted through ``[..., H]``, that do not read all that they hold.
        tokens: of each entry, ``[..., H, n]`` int64; given where there are readers.
        signals: of the layer's prompt; likewise.
        padded: whether some rows hold fewer than n, where that is known without asking the device.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    footprint_bytes: tuple[int, ...]
    log_weight: Tensor | None = None
    readers: Mapping[Reader, tuple[int, ...]] = field(default_factory=dict)
    tokens: Tensor | None = None
    signals: Signals | None = None
    padded: bool | None = None

    def attended(self, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of queries to the prompt alone, and its log-sum-exp, as ``attend`` gives them.

        On a CPU each row is as long as what it holds: a policy whose heads keep a few tokens here
        and all of them there would mostly attend to padding.

        Args:
            queries: ``[..., H, G, C, D]``.
            scale: factor of the scores before the softmax.
        """
        plain = not self.readers and self.log_weight is None
        if self.padded and plain and self.keys.device.type == "cpu":
            return self._attended_by_size(queries, scale)
        keys, values = self.keys.unsqueeze(-3), self.values.unsqueeze(-3)
        return attend(queries, keys, values, self.visible(queries), scale, self.weights)

    def _attended_by_size(self, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The same, rows that hold equally many entries together."""
        asking, stored = queries.shape[-3:], self.keys.shape[-2:]
        lead = torch.broadcast_shapes(queries.shape[:-3], self.counts.shape)
        queries = queries.expand(*lead, *asking).flatten(0, -4)
        keys, values = (x.expand(*lead, *stored).flatten(0, -3) for x in (self.keys, self.values))
        counts = self.counts.expand(lead).flatten()
        output = queries.new_empty(len(queries), *asking[:-1], values.shape[-1])
        log_sum = queries.new_empty(len(queries), *asking[:-1])
        for size in counts.unique().tolist():
            rows = _span((counts == size).nonzero()[:, 0].tolist())
            held, read = (x[rows, :size][:, None, None] for x in (keys, values))
            found = attend(queries[rows][:, None], held, read, None, scale)
            output[rows], log_sum[rows] = (x[:, 0] for x in found)
        return output.unflatten(0, lead), log_sum.unflatten(0, lead)

    def visible(self, queries: Tensor) -> Tensor | None:
        """Entries that queries ``[..., H, G, C, D]`` attend to; None where that is all.

        Returns:
            ``[..., H, 1, 1 or C, n]`` bool.
        """
        visible = self._real()
        for reader, rows in self.readers.items():
            read = self._read(reader, on_device(rows, self.keys.device), queries)
            visible = read if visible is None else visible & read
        return visible

    def _real(self) -> Tensor | None:
        """Entries that are no padding, ``[..., H, 1, 1, n]``; None where there is none."""
        if self.padded is False:
            return None
        place = torch.arange(self.keys.shape[-2], device=self.keys.device)
        real = place < self.counts[..., None]
        if self.padded is None and bool(real.all()):
            return None
        return real[..., None, None, :]

    def _read(self, reader: Reader, rows: Tensor, queries: Tensor) -> Tensor:
        lead, (held, head_dim) = self.keys.shape[:-2], self.keys.shape[-2:]
        group, count = queries.shape[-3:-1]
        asking = queries.expand(*lead, group, count, head_dim).reshape(-1, group, count, head_dim)
        flags = torch.ones(len(asking), count, held, dtype=torch.bool, device=rows.device)
        flags[rows] = reader.reads(self._held(rows), asking[rows].float())
        return flags.view(*lead, 1, count, held)

    def _held(self, rows: Tensor) -> Held:
        if self.tokens is None or self.signals is None:
            raise RuntimeError("a reader was given nothing to choose from")
        heads = self.counts.shape[-1]
        return Held(
            self.keys.flatten(0, -3)[rows].float(),
            self.counts.flatten()[rows],
            self.tokens.flatten(0, -2)[rows],
            rows % heads,
            (rows // heads).unique(return_inverse=True)[1],
            self.signals,
            self.signals.prompt_tokens,
        )

    @property
    def weights(self) -> Tensor | None:
        """``log_weight`` as attention over ``[..., H, G, C, n]`` takes it."""
        return None if self.log_weight is None else self.log_weight[..., None, None, :]

    def of_policy(self, row: int) -> Compressed:
        """One policy's ``[H, ...]`` of several."""
        heads = self.counts.shape[-1]
        mine = range(row * heads, (row + 1) * heads)
        readers = {
            reader: tuple(r - mine.start for r in rows if r in mine)
            for reader, rows in self.readers.items()
        }
        return Compressed(
            self.keys[row],
            self.values[row],
            self.counts[row],
            self.footprint_bytes[row : row + 1],
            None if self.log_weight is None else self.log_weight[row],
            {reader: rows for reader, rows in readers.items() if rows},
            None if self.tokens is None else self.tokens[row],
            self.signals,
            self.padded,
        )


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as int64 on a device, on their way while the caller goes on.

    A copy from memory that is not pinned waits until the GPU has done all that it was given.
    """
    pinned = device.type == "cuda"
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=pinned)


def _span(rows: list[int]) -> slice | list[int]:
    """Ascending rows as a slice where they are neighbours: what it picks is not copied."""
    alone = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if alone else rows
