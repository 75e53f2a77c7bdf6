"""One layer of the paged cache as transformers sees it; ``attention.py`` finds it.

A prompt comes in one piece: it is answered as ever, then each KV head's tokens are chosen and
stored and the rest is dropped. Sequences may come together or one after another; when all are
stored, what comes after them is kept: generated tokens, and further turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import CacheLayerMixin

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import count_of
from kvtune.policies.page_formats import PAGE
from kvtune.policies.placement import evicts_coded
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.choosing import Choice, choose, side_by_side, weights_of
from kvtune.runtime.cache.evicting import Evictor
from kvtune.runtime.cache.filling import Filling, Taken
from kvtune.runtime.cache.foreseen import window_of
from kvtune.runtime.cache.host_rows import HostRows
from kvtune.runtime.cache.leaving import free
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.reading import equally_long, lengths_of, padded, signals_of
from kvtune.runtime.cache.segments import NO_END
from kvtune.runtime.cache.sliding import check_sliding
from kvtune.runtime.cache.storing import store_prompts
from kvtune.runtime.cache.watching import attend_seeing
from kvtune.runtime.cache.whole_prompt import condensed
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.kernels.reference import rotate
from kvtune.runtime.rotation import owed
from kvtune.traces.seam import prompt_attention

if TYPE_CHECKING:
    from kvtune.runtime.cache.policy_cache import PolicyCache


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer, as transformers knows them; ``attention`` finds it by the keys it returns."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PolicyCache, number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number
        self.paged: PagedLayer
        self.evictors: list[Evictor] = []
        self.seen = 0  # tokens of the batch, padding included; from when every prompt is stored
        self.window: int | None = None  # of a sliding layer, if it will be exceeded
        self.waiting: list[Signals] = []  # of each sequence, until the whole model has read it
        self.filling: Filling  # while prompts are read

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are taken when the prompt has been seen."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new tokens on to ``attention``, which stores them."""
        self.cache.check_answering()
        if self.seen and not self.cache.captured:
            self.seen += key_states.shape[-2]
        keys: Any = key_states
        keys.paged_cache_layer = self
        return keys, value_states

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, scale: float) -> Any:
        """Causal attention of each prompt on its own, ``[B, Hq, P, D]``; then store it.

        Of the sequences that the cache reads now; of all of them where it was not told.
        """
        cache = self.cache
        if cache.reading is None:
            cache.open(k.device, lengths_of(k, padding), k.shape[2])
            cache.reading = range(len(cache.prompts))
        lengths = [cache.prompts[row] for row in cache.reading][: len(k)]
        alike = equally_long(lengths, k.shape[2])
        parts = [(q[at], k[at], v[at]) for at in alike]
        outputs = [prompt_attention(*part, scale, self.window) for part in parts]
        self.take_in([signals for part in parts for signals in self.signals(*part, scale)])
        return padded(outputs, q.shape[2])

    def open(self) -> None:
        """Prompts, whose lengths the cache knows now, are about to be read."""
        cache = self.cache
        self.window = window_of(cache.geometry, self.number, max(cache.prompts), cache.new_tokens)
        if self.window and cache.waits:
            raise KvtuneError(
                f"layer {self.number} slides over {self.window} tokens, and the policy "
                f"{cache.policy.name!r} waits for the whole prompt",
                hint="use a method and an allocator that choose layer by layer.",
            )
        if self.window:
            check_sliding(self.number, self.window, cache.policy.heads[self.number])
        self.filling = Filling(
            cache.shared, len(cache.layers), self.window, cache.evicts, cache.sentence_ends
        )

    def signals(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Signals]:
        """What methods may look at, of some equally long prompts; see ``reading``."""
        if self.window:
            q, k, v = (x[:, :, -self.window :] for x in (q, k, v))
        return signals_of(self.cache, self.number, (q, k, v), scale)

    def take_in(self, read: Sequence[Signals]) -> None:
        """The layer has read some sequences' prompts, or one that stands for them."""
        if self.cache.waits:
            self.waiting = [condensed(signals, self.cache.needs) for signals in read]
        else:
            self.store(read)

    def choose(self, row: int, signals: Signals) -> Choice:
        """What is kept of one sequence, or of several from this one on."""
        cache = self.cache
        planned = cache.budgets[row][self.number].clip(0, signals.prompt_tokens).tolist()
        return choose(cache.policy, planned, signals, cache.evicts and not self.window)

    def store(self, read: Sequence[Signals]) -> None:
        """Choose from what ``take_in`` was given, put it into pages, forget the rest."""
        cache, self.waiting = self.cache, []
        heads, sequences = cache.policy.kv_heads, cache.reading or range(0)
        counts = [len(signals.keys) // heads for signals in read]
        firsts = itertools.accumulate(counts, initial=sequences.start)
        # One more first than there are prompts: where a next one would begin.
        self.hold(read, [self.choose(*asked) for asked in zip(firsts, read, strict=False)])

    def hold(self, read: Sequence[Signals], choices: Sequence[Choice]) -> None:
        """Put what was chosen of the sequences that the cache reads now into pages."""
        cache, heads = self.cache, self.cache.policy.kv_heads
        sequences = cache.reading or range(0)
        if sequences.start == 0:
            self.paged = self._empty()
        rows = slice(heads * sequences.start, heads * sequences.stop)
        taken = Taken(self.paged, rows, read, choices)
        self._put(taken)
        self.filling.take(taken)
        if sequences.stop == len(cache.prompts):
            self._finish()

    def _put(self, taken: Taken) -> None:
        """Kept tokens into pages; what they count for."""
        paged, rows, choices = self.paged, taken.rows, taken.choices
        count = rows.stop - rows.start
        rooms = [room for choice in choices for room in choice.rooms]
        none = self.window or NO_END
        paged.most[rows] = np.resize([room.most if room else none for room in rooms], count)
        options = itertools.cycle(paged.options)
        coded = [
            room is not None and evicts_coded(option, paged.head_dim)
            for option, room in zip(options, rooms, strict=False)
        ]
        paged.evicts_coded[rows] = np.resize(coded, count)
        exact = [count for choice in choices for count in choice.exact]
        newest = [count for choice in choices for count in choice.newest]
        keys, values = side_by_side(taken.read, choices)
        weights = weights_of(choices, keys)
        store_prompts(paged, keys, values, taken.kept, exact, rows, weights, newest)
        held = [size for choice in choices for size in choice.held_bytes]
        paged.held_bytes[rows] = np.resize(held, count).tolist()

    def _finish(self) -> None:
        """Every sequence's prompt is stored: tables of all rows, and room for new tokens."""
        cache, self.seen = self.cache, self.cache.width
        self.evictors = self.filling.finish(self.paged, cache.geometry.head_dim)
        del self.filling
        if self is cache.layers[-1]:
            cache.reading = None
            cache.check_finite()
        self.paged.seal(cache.new_tokens)
        cache.make_room(self.paged, min(PAGE, cache.new_tokens))

    def _empty(self) -> PagedLayer:
        """A paged layer that holds nothing yet."""
        cache, options = self.cache, self.cache.policy.heads[self.number]
        layer = PagedLayer(
            self.number, options, cache.geometry.head_dim,
            len(cache.prompts), cache.pool, cache.backend, cache.residual, cache.growth.window,
        )  # fmt: skip
        if cache.host_pool and cache.landing and any(option.on_host for option in options):
            layer.host = HostRows(cache.host_pool, cache.landing, cache.backend)
        return layer

    def turn(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append further tokens, each of which sees those before it, ``[B, Hq, T, D]``."""
        if q.shape[2] == 1:
            return self.step(q, k, v, scale)
        tokens = [slice(at, at + 1) for at in range(q.shape[2])]
        parts = [self.step(q[:, :, at], k[:, :, at], v[:, :, at], scale) for at in tokens]
        return torch.cat(parts, dim=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append one token a sequence and attend, ``[B, Hq, 1, D]``."""
        layer, cache = self.paged, self.cache
        if not cache.captured:
            self._refuse_unforeseen()
            cache.make_room(layer, 1)
        if rotation := owed(q, k):
            q = layer.append_rotated(rotation, v[:, :, 0])
        else:
            layer.append(k[:, :, 0], v[:, :, 0])
        if not cache.captured:
            layer.count_appended()
        queries = q.reshape(layer.rows, -1, q.shape[-1])
        if not self.evictors:
            return layer.attend(queries, self._scratch(queries), scale).view_as(q)
        turned = rotate(k, rotation.cos, rotation.sin) if rotation else k
        newest = turned[:, :, 0].flatten(0, 1), v[:, :, 0].flatten(0, 1)
        return self._attend_evicting(queries, newest, scale).view_as(q)

    def free(self, sequence: int) -> None:
        """A sequence has ended: give back what the layer holds of it."""
        heads = len(self.paged.options)
        rows = range(sequence * heads, (sequence + 1) * heads)
        self.evictors = [each for each in self.evictors if each.forget(rows)]
        free(self.paged, sequence)

    def _refuse_unforeseen(self) -> None:
        """A prompt that was stored as if nothing left it cannot begin to slide."""
        cache = self.cache
        window = cache.geometry.windows[self.number]
        if window and not self.window and self.seen - cache.padding > window:
            raise KvtuneError(
                f"layer {self.number} attends to a window of {window} tokens, and did not expect "
                "to see more",
                hint="give load_cache(..., new_tokens=) as many as will be generated.",
            )

    def _attend_evicting(self, q: Tensor, newest: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """Attend; then let go of what must leave."""
        layer, scratch = self.paged, self._scratch(q)
        for evictor in self.evictors:
            evictor.enter(layer, *newest)
        if any(evictor.watches for evictor in self.evictors):
            output, seen = attend_seeing(layer, q, scratch, scale)
        else:
            output, seen = layer.attend(q, scratch, scale), None
        for evictor in self.evictors:
            if seen is not None:
                evictor.observe(layer, seen)
            evictor.evict(layer)
        return output

    def _scratch(self, queries: Tensor) -> Scratch:
        """One for all layers, as large as the largest has needed."""
        cache, rows, group = self.cache, self.paged.rows, queries.shape[1]
        if cache.scratch is None or len(cache.scratch.lse) < self.paged.slots:
            slots = max(layer.paged.slots for layer in cache.layers if layer.seen)
            cache.scratch = Scratch(rows, slots, group, queries.shape[2], queries.device)
        return cache.scratch

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers continues counting from."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Of the mask that transformers would make."""
        return self.seen + count_of(query_length), 0

    def get_max_length(self) -> int:
        """Return -1: the cache grows without a limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in the first releases

    def crop(self, max_length: int) -> None:
        """Refused: what was evicted cannot come back."""
        raise KvtuneError("a compressed prompt cannot be cropped: what was evicted is gone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: what was evicted cannot come back."""
        raise KvtuneError("no beam search with a compressed prompt")

    def reset(self) -> None:
        """Not possible: make a new cache."""
        raise KvtuneError("a compressed cache serves one batch of prompts; load another")
