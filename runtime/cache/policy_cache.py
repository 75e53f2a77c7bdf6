"""A tuned plan in transformers: a cache that ``model.generate`` accepts, stored in pages.

::

    from kvtune.runtime import load_cache
    with load_cache("policy.yaml", model) as cache:
        model.generate(**inputs, past_key_values=cache)

The first forward pass is the prompt, in one piece; sequences of different lengths are padded on
the left. When a layer has answered it, each KV head's tokens are chosen and stored and the rest is
dropped, so that one layer at a time is uncompressed. What comes after it, generated tokens and
further turns of a conversation, is kept in 16 bits beside it; with
``evicts=True`` heads whose method can go on evicting do, so that they stay within their budgets.

What was evicted is gone: the cache cannot be cropped, and prefix reuse would give the next user a
prompt that was compressed for this one (store prompts, not caches). Give the prompt in one piece:
only its first piece would be compressed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from kvtune.common.errors import KvtuneError
from kvtune.common.transformers_interface import cache_argument, register_attention
from kvtune.common.units import format_bytes
from kvtune.policies.apply import linked
from kvtune.policies.option import Option
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import (
    SLAB_CELLS,
    Growth,
    Pages,
    head_pages,
    landing_cells,
    pool_cells,
    spare_pages,
    splits,
)
from kvtune.policies.policy import Policy
from kvtune.policies.policy_file.reader import read_policy
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.answering import NAME, Answering
from kvtune.runtime.cache.backend import Backend, PlainBackend, TritonBackend, backend_for
from kvtune.runtime.cache.beside import Shared
from kvtune.runtime.cache.evicting import check_evicting
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.host_rows import Landing
from kvtune.runtime.cache.layer import CacheLayer, attention, padding_mask
from kvtune.runtime.cache.limit import check_limit
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.placing import check_host, warn_of_slow_formats
from kvtune.runtime.cache.pool import Pool
from kvtune.runtime.cache.selecting import check_reader
from kvtune.runtime.cache.sentences import SentenceEnds, watch
from kvtune.runtime.cache.settling import check_residual, settle
from kvtune.runtime.cache.whole_prompt import calibration_for, check_passes, repeated, when_read
from kvtune.runtime.kernels.launch import Scratch
from kvtune.traces.calibration import Calibration
from kvtune.traces.geometry import Geometry, read_geometry
from kvtune.traces.learned import learned_layers
from kvtune.traces.models import fingerprint
from kvtune.traces.self_check import Ask, Part, require_same


def load_cache(
    policy: Path | str | Policy,
    model: Any,
    *,
    new_tokens: int = 1024,
    evicts: bool = False,
    residual: int | None = None,
    limit_bytes: int | None = None,
    tokenizer: Any = None,
) -> PolicyCache:
    """A cache for one conversation under a policy; the model answers through it from now on.

    As a context manager, or with ``close``, the model's former attention is put back at the end.

    Args:
        policy: a policy file, or a policy.
        model: a transformers causal language model with plain attention.
        new_tokens: to make room for at first; more is made when they are exceeded.
        evicts: whether methods that can go on evicting while tokens are generated do; if not, all
            generated tokens stay.
        residual: newest generated tokens that stay in 16 bits, where older ones take their head's
            own format, a page of 64 at a time (KIVI); None for all of them. Heads that evict from
            fewer than 16 bits keep so many, and up to twice as many, in 16 bits; without it none.
        limit_bytes: that the pool of pages never exceeds; None for no limit. Policies that hold
            more of a prompt than is in pages are refused with it.
        tokenizer: the model's, for policies that ask it to repeat its prompt (KVzip), that go by
            sentences (SentenceKV), or that must measure it first (CompressKV, on a model that was
            never measured).

    Raises:
        KvtuneError: unreadable policy, another model's shape, an unsupported format or head, or a
            model that kvtune would not answer for as it does itself. When prompts are read, or
            later: more pages than the limit allows.
    """
    geometry = read_geometry(model)
    shape = geometry.layers, geometry.kv_heads
    bound = policy if isinstance(policy, Policy) else read_policy(policy).bind(*shape)
    bound.check_fits(*shape)
    check_passes(bound, tokenizer)
    for option in dict.fromkeys(bound.options()):
        check_host(option, geometry.head_dim, evicts)
        check_reader(option, geometry.head_dim)
    if evicts:
        check_evicting(bound, geometry.head_dim)
    if residual is not None:
        check_residual(bound, residual)
    register_attention(NAME, attention, padding_mask)
    require_same(model, geometry, NAME, _through_pages(model, geometry), stored_last=True)
    cache = PolicyCache(bound, geometry, new_tokens, evicts, residual, limit_bytes=limit_bytes)
    warn_of_slow_formats(bound, geometry.head_dim, in_place=model.device.type == "cuda")
    if bound.needs.calibration:
        cache.calibration = calibration_for(model, geometry, tokenizer)
    if bound.needs.learned:
        name = fingerprint(model, geometry)
        cache.learned = learned_layers(name, geometry.layers, str(model.device))
    if bound.needs.asks_model:
        cache.repeat = partial(repeated, model, geometry, tokenizer, bound.needs)
    if bound.needs.sentences:
        cache.sentences = SentenceEnds(tokenizer)
        watch(model, cache, cache.sentences)
    if cache.waits:
        when_read(model, cache)
    cache.answering = Answering.begin(model)
    return cache


def _through_pages(model: Any, geometry: Geometry) -> Ask:
    """How the self-check asks a model: a prompt, then a token from uncompressed pages."""
    uncompressed = Policy.uniform(Option(), geometry.layers, geometry.kv_heads)
    # Plain torch on any device: no kernel is compiled for so little.
    cache = PolicyCache(uncompressed, geometry, 1, backend_of=lambda _: PlainBackend())

    def ask(ids: Tensor, part: Part) -> Tensor:
        mask = torch.ones(1, part.stop, dtype=torch.long, device=ids.device)
        logits: Tensor = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **cache_argument(model, cache)
        ).logits
        if part.stored:
            cache.layers.clear()  # they refer to it, and would keep its memory until collected
        return logits

    return ask


class PolicyCache(Cache):  # type: ignore[misc]
    """All layers of a model in one pool of pages. For one batch of prompts."""

    def __init__(
        self,
        policy: Policy,
        geometry: Geometry,
        new_tokens: int = 1024,
        evicts: bool = False,
        residual: int | None = None,
        backend_of: Callable[[torch.device], Backend] | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """Hold nothing yet: memory is taken when the prompt's length is known."""
        self.policy, self.geometry = policy, geometry
        self.new_tokens, self.evicts, self.residual = new_tokens, evicts, residual
        self.growth, self.limit_bytes = Growth(new_tokens, evicts, residual), limit_bytes
        self.calibration: Calibration | None = None
        self.learned: list[dict[str, Tensor]] = []
        self.repeat: Callable[[list[int], list[Signals]], list[Signals]] | None = None
        self.sentences: SentenceEnds | None = None
        self.waits, self.needs = policy.waits, policy.needs
        self.prompts: list[int] = []  # their lengths, as soon as the first is read
        self.width = 0  # of the batch: the longest prompt, and padding before it
        self.reading: range | None = None  # sequences whose prompts the model reads now
        self.answering: Answering | None = None  # through this cache, once it is loaded
        self.pool: Pool
        self.backend: Backend
        self._backend_of = backend_of
        self.host_pool: HostPool | None = None  # where a policy keeps heads on the host
        self.landing: Landing | None = None
        self.scratch: Scratch | None = None
        self.shared: Shared = {}  # directions that two layers store once
        self.captured = False  # by a graph: counting and reserving is then the decode loop's
        super().__init__(layers=[CacheLayer(self, n) for n in range(policy.layers)])

    def __enter__(self) -> PolicyCache:
        """The cache; the model answers through it until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the model answer as it did before."""
        self.close()

    def close(self) -> None:
        """Let the model answer as it did before the cache was loaded. Safe to call again."""
        if self.answering:
            self.answering.end()

    def check_answering(self) -> None:
        """Refuse tokens that the model's other attention would answer."""
        if self.answering:
            self.answering.check()

    def open(self, device: torch.device, prompts: list[int], width: int | None = None) -> None:
        """Take memory for prompts of these lengths, which are about to be read.

        Args:
            device: where they are read.
            prompts: tokens of each sequence's.
            width: of the batch, padding included; the longest prompt unless given.

        Raises:
            KvtuneError: another batch's prompts were begun, or a layer cannot take them.
        """
        if self.prompts:
            raise KvtuneError(
                "this cache has begun to read other prompts",
                hint="a cache serves one batch of prompts; load another.",
            )
        self.backend, self.prompts = (self._backend_of or backend_for)(device), prompts
        self.width = width or max(prompts)
        planned = {tokens: self.policy.budgets(tokens) for tokens in set(prompts)}
        self.budgets = [planned[tokens] for tokens in prompts]
        self._take_memory(device)
        for layer in self.layers:
            layer.open()

    def sentence_ends(self, sequence: int) -> Tensor:
        """Which tokens that a sequence was given so far end a sentence, ``[N]`` bool."""
        if self.sentences is None:
            raise KvtuneError("where sentences end is read only by policies that ask for it")
        return self.sentences.of(sequence, self.prompts[sequence])

    @property
    def padding(self) -> int:
        """Columns before the longest prompt."""
        return self.width - max(self.prompts)

    @torch.no_grad()
    def read(self, token_ids: Tensor | None) -> bool:
        """The last layer has read prompts ``[B, P]``: store what waited for this.

        Returns:
            Whether other sequences' prompts are still to be read.
        """
        rows = [list(layers) for layers in zip(*(x.waiting for x in self.layers), strict=True)]
        if self.repeat:
            rows = self._repeated(rows, token_ids)
        settled = [
            self.policy.settle(layers[0].prompt_tokens, layers.__getitem__) for layers in rows
        ]
        rows = [self._linked(layers) for layers in rows]
        sequences = self.reading or range(0)
        planned = self._cells_for(sequences)
        for number, sequence in enumerate(sequences):  # one prompt may stand for all
            self.budgets[sequence] = settled[number % len(settled)]
        if (missing := self._cells_for(sequences) - planned) > 0:
            self._extend(missing)
        for layer in self.layers:
            layer.store([layers.pop(0) for layers in rows])  # and keep none of it
        return self.reading is not None

    def _linked(self, layers: list[Signals]) -> list[Signals]:
        """One sequence's layers ``[L]``, each with the layer that its methods link to it."""
        pairs = zip(layers, self.policy.heads, strict=True)
        return [linked(each, options, len(layers), layers.__getitem__) for each, options in pairs]

    def _repeated(self, rows: list[list[Signals]], token_ids: Tensor | None) -> list[list[Signals]]:
        """What the layers have read of each sequence, ``[B][L]``, after it was repeated."""
        if token_ids is None or self.repeat is None:
            raise KvtuneError("a prompt that was given as embeddings cannot be repeated in words")
        return [
            self.repeat(ids[-layers[0].prompt_tokens :], layers)
            for layers, ids in zip(rows, token_ids.tolist(), strict=True)
        ]

    def _take_memory(self, device: torch.device) -> None:
        """For all prompts, as far as their budgets are known, and for new tokens."""
        self.pool = Pool(0, PageLayout(self.geometry.head_dim).cell_bytes, device)
        if self.limit_bytes is not None:
            pairs = zip(self.prompts, self.budgets, strict=True)
            check_limit(self.policy, dict(pairs), self.geometry.head_dim)
        self._extend(self._cells_for(range(len(self.prompts))))
        if self.policy.uses_host:
            self.host_pool, self.landing = HostPool(device), Landing(self.pool)

    def _extend(self, cells: int) -> None:
        """Take so many cells more, within the limit.

        Raises:
            KvtuneError: they would exceed it; nothing is taken.
        """
        wanted = self.pool.memory.numel() + self.pool.bytes_of(cells)
        if self.limit_bytes is not None and wanted > self.limit_bytes:
            raise KvtuneError(
                f"the cache's pages would take {format_bytes(wanted)}, and its limit is "
                f"{format_bytes(self.limit_bytes)}",
                hint="give its heads smaller budgets, make it for fewer new_tokens, or raise "
                "limit_bytes.",
            )
        self.pool.extend(cells)

    def _within_limit(self, cells: int) -> int:
        """So many cells, or as many slabs as the limit leaves, if it leaves one."""
        if self.limit_bytes is None:
            return cells
        slabs = (self.limit_bytes - self.pool.memory.numel()) // self.pool.bytes_of(1)
        return min(cells, slabs * SLAB_CELLS) if slabs > 0 else cells

    def _cells_for(self, sequences: range) -> int:
        """Cells of a pool that holds some sequences at their ends."""
        each = [(self.prompts[row], self.budgets[row]) for row in sequences]
        distinct = {id(budgets): (tokens, budgets) for tokens, budgets in each}
        counts = Counter(id(budgets) for _, budgets in each)
        pages = Pages()
        for name, one in distinct.items():
            for layout, count in self._pages_wanted(*one).items():
                pages[layout] += counts[name] * count
        longest = max((tokens for tokens, _ in each), default=0)
        landing = landing_cells(self.policy, longest, self.geometry.head_dim, len(each))
        return pool_cells(pages) + landing

    def check_finite(self) -> None:
        """All layers have read the prompts: whether all that they read were numbers.

        Raises:
            KvtuneError: names the first layer and KV head where they were not.
        """
        fine = torch.stack([layer.paged.finite for layer in self.layers]).cpu().numpy()
        if not fine.all():
            layer, row = np.argwhere(~fine)[0]
            head = row % self.policy.kv_heads
            raise KvtuneError(f"layer {layer}, KV head {head}: a key or value is not finite")

    def window_of(self, layer: int, prompt_tokens: int) -> int | None:
        """A layer's sliding window, if a sequence will exceed it."""
        window = self.geometry.windows[layer]
        if window is None or prompt_tokens + self.new_tokens <= window:
            return None
        return window

    def _pages_wanted(self, tokens: int, budgets: NDArray[np.int64]) -> Pages:
        """By one sequence, at its end; some more a head where budgets may still be split anew."""
        pages, head_dim = Pages(), self.geometry.head_dim
        split = splits(self.policy)
        for layer, (options, planned) in enumerate(zip(self.policy.heads, budgets, strict=True)):
            window = self.window_of(layer, tokens)
            for option, count in zip(options, planned.tolist(), strict=True):
                theirs = head_pages(option, count, tokens, head_dim, self.growth, window)
                pages += theirs
                if split:
                    pages += spare_pages(option, theirs, head_dim)
        return pages

    def reserve(self, tokens: int) -> None:
        """Pages for so many more tokens of every row."""
        for layer in self.layers:
            self.make_room(layer.paged, tokens)

    def make_room(self, layer: PagedLayer, tokens: int) -> None:
        """Pages for so many more tokens of a layer's rows; a full pool grows."""
        try:
            settle(layer)
            layer.reserve(tokens)
        except KvtuneError:
            if self.captured:
                raise
            growing = layer.growing_layout
            grown = layer.rows * growing.page_cells * growing.pages_for(PAGE + self.new_tokens)
            self._extend(self._within_limit(self.policy.layers * grown))
            for other in self.layers:
                if other.seen:  # while prompts are read, later ones have no tables yet
                    other.paged.seal(self.new_tokens)
            self.make_room(layer, tokens)

    @property
    def can_be_captured(self) -> bool:
        """Whether a decode step asks nothing of the host."""
        read = [layer.paged for layer in self.layers if hasattr(layer, "paged")]
        dense = all(each.beside is None or each.beside.is_dense for each in read)
        dense = dense and not any(each.searched for each in read)
        return dense and isinstance(self.backend, TritonBackend) and not self.evicts

    def prompt_bytes(self) -> int:
        """Bytes of the compressed prompts, as formats count them."""
        return sum(layer.paged.prompt_bytes() for layer in self.layers)

    def page_bytes(self) -> int:
        """Bytes of all pages in use on the device."""
        return self.pool.used_bytes

    def host_bytes(self) -> int:
        """Bytes of keys and values on the host: pages in use, and what is searched there."""
        read = [layer.paged for layer in self.layers if hasattr(layer, "paged")]
        searched = [each for layer in read for each in layer.searched]
        found: int = sum(each.nbytes for each in searched if each.on_host)
        return found + (0 if self.host_pool is None else self.host_pool.used_bytes)

    def kept(self) -> list[list[int]]:
        """Prompt tokens kept, by layer and row."""
        return [list(layer.paged.kept) for layer in self.layers]

    def evicted(self) -> list[list[int]]:
        """Entries that left while tokens were generated, by layer and row."""
        return [layer.paged.evicted.tolist() for layer in self.layers]
