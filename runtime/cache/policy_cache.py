"""All layers of a model in one pool of pages: a cache of transformers, for one batch of prompts.

Memory is taken when the prompts' lengths are known, for what their budgets foresee and for new
tokens; ``loading.py`` attaches a cache to a model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from kvtune.common.errors import KvtuneError
from kvtune.policies.apply import linked
from kvtune.policies.page_formats import PAGE
from kvtune.policies.pages import PageLayout
from kvtune.policies.paging import Growth
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.runtime.cache.answering import Answering
from kvtune.runtime.cache.backend import Backend
from kvtune.runtime.cache.beside import Shared
from kvtune.runtime.cache.foreseen import cells_for
from kvtune.runtime.cache.host_pool import HostPool
from kvtune.runtime.cache.host_rows import Landing
from kvtune.runtime.cache.layer import CacheLayer
from kvtune.runtime.cache.limit import LimitedPool, check_limit
from kvtune.runtime.cache.paged_layer import PagedLayer
from kvtune.runtime.cache.pool import PoolFullError
from kvtune.runtime.cache.reserving import reserve
from kvtune.runtime.cache.sentences import SentenceEnds
from kvtune.runtime.cache.settling import settle
from kvtune.runtime.cache.which_backend import backend_for
from kvtune.runtime.kernels.launch import Scratch
from kvtune.traces.calibration import Calibration
from kvtune.traces.geometry import Geometry


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
        self.pool: LimitedPool
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
            self.pool.extend(missing)
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
        cell_bytes = PageLayout(self.geometry.head_dim).cell_bytes
        self.pool = LimitedPool(cell_bytes, device, self.limit_bytes)
        if self.limit_bytes is not None:
            pairs = zip(self.prompts, self.budgets, strict=True)
            check_limit(self.policy, dict(pairs), self.geometry.head_dim)
        self.pool.extend(self._cells_for(range(len(self.prompts))))
        if self.policy.uses_host:
            self.host_pool, self.landing = HostPool(device), Landing(self.pool)

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

    def _cells_for(self, sequences: range) -> int:
        """Cells of a pool that holds some sequences at their ends."""
        each = [(self.prompts[row], self.budgets[row]) for row in sequences]
        return cells_for(self.policy, self.geometry, self.growth, each)

    def reserve(self, tokens: int) -> None:
        """Pages for so many more tokens of every row."""
        for layer in self.layers:
            self.make_room(layer.paged, tokens)

    def make_room(self, layer: PagedLayer, tokens: int) -> None:
        """Pages for so many more tokens of a layer's rows; a full pool grows."""
        try:
            settle(layer)
            reserve(layer, tokens)
        except PoolFullError:
            if self.captured:
                raise
            growing = layer.growing_layout
            grown = layer.rows * growing.page_cells * growing.pages_for(PAGE + self.new_tokens)
            self.pool.extend(self.pool.within_limit(self.policy.layers * grown))
            for other in self.layers:
                if other.seen:  # while prompts are read, later ones have no tables yet
                    other.paged.seal(self.new_tokens)
            self.make_room(layer, tokens)

    def free(self, sequence: int) -> None:
        """A sequence of the batch has ended: its memory is others' now.

        It stays in the batch; what the model is given for it is not stored, and what it answers
        means nothing.

        Raises:
            KvtuneError: there is no such sequence, or prompts are still being read.
        """
        if sequence not in range(len(self.prompts)):
            raise KvtuneError(
                f"there is no sequence {sequence} in a batch of {len(self.prompts)}",
                hint="sequences are counted from 0, in the order of the prompts.",
            )
        if self.reading is not None:
            raise KvtuneError(
                f"sequence {sequence} cannot be freed while prompts are read",
                hint="free it when the model has read all of them.",
            )
        self.shared = {name: held for name, held in self.shared.items() if name[0] != sequence}
        for layer in self.layers:
            layer.free(sequence)

    @property
    def can_be_captured(self) -> bool:
        """Whether a decode step asks nothing of the host."""
        read = [layer.paged for layer in self.layers if hasattr(layer, "paged")]
        dense = all(each.beside is None or each.beside.is_dense for each in read)
        dense = dense and not any(each.searched for each in read)
        return dense and self.backend.has_kernels and not self.evicts

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
