"""A tuned plan in transformers: a cache that ``model.generate`` accepts, stored in pages.

::

    from kvtune.runtime import load_cache
    cache = load_cache("policy.yaml", model)
    model.generate(**inputs, past_key_values=cache)

The first forward pass is the prompt, in one piece; sequences of different lengths are padded on
the left. When a layer has answered it, each KV head's tokens are chosen and stored and the rest is
dropped, so that one layer at a time is uncompressed. From then on tokens come one by one, and with
``evicts=True`` heads whose method can go on evicting do, so that they stay within their budgets.

What was evicted is gone: the cache cannot be cropped, prefix reuse would give the next user a
prompt that was compressed for this one (store prompts, not caches), and a prompt in chunks would
be chosen from before it was read to its end. These are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from kvtune.common.errors import KvtuneError
from kvtune.policies.document_reader import read_policy
from kvtune.policies.policy import Policy
from kvtune.runtime.backend import Backend, backend_for
from kvtune.runtime.evicting import Room, check_evicting
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.kernels.layout import PAGE, PageLayout, exact_tokens, layout_of
from kvtune.runtime.layer import CacheLayer, attention, padding_mask
from kvtune.runtime.paged import PagedLayer
from kvtune.runtime.pool import SLAB_CELLS, Pool
from kvtune.traces.geometry import Geometry, read_geometry

NAME = "kvtune_paged"
"""The attention implementation that hands queries to the cache."""


def load_cache(
    policy: Path | str | Policy, model: Any, *, new_tokens: int = 1024, evicts: bool = False
) -> PolicyCache:
    """A cache for one ``generate`` under a policy; the model answers through it from now on.

    Args:
        policy: a policy file, or a policy.
        model: a transformers causal language model with plain attention.
        new_tokens: to make room for at first; more is made when they are exceeded.
        evicts: whether methods that can go on evicting while tokens are generated do; if not, all
            generated tokens stay.

    Raises:
        KvtuneError: unreadable policy, another model's shape, an unsupported format or head.
    """
    config = model.config.get_text_config()
    shape = config.num_hidden_layers, config.num_key_value_heads
    bound = policy if isinstance(policy, Policy) else read_policy(policy).bind(*shape)
    bound.check_fits(*shape)
    _refuse_other_passes(bound)
    if evicts:
        check_evicting(bound)
    geometry = read_geometry(model)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    model.set_attn_implementation(NAME)
    return PolicyCache(bound, geometry, new_tokens, evicts)


def _refuse_other_passes(policy: Policy) -> None:
    needs = policy.needs
    for name in ("reconstruction", "calibration", "future", "probes"):
        if getattr(needs, name):
            raise KvtuneError(
                f"the policy {policy.name!r} needs {name}, more than reading a prompt once gives",
                hint="kvtune validate runs it; a generating cache cannot.",
            )


class PolicyCache(Cache):  # type: ignore[misc]
    """All layers of a model in one pool of pages. For one batch of prompts."""

    def __init__(
        self, policy: Policy, geometry: Geometry, new_tokens: int = 1024, evicts: bool = False
    ) -> None:
        """Hold nothing yet: memory is taken when the prompt's length is known."""
        self.policy, self.geometry = policy, geometry
        self.new_tokens, self.evicts = new_tokens, evicts
        self.pool: Pool
        self.backend: Backend
        self.scratch: Scratch | None = None
        self.captured = False  # by a graph: counting and reserving is then the decode loop's
        super().__init__(layers=[CacheLayer(self, n) for n in range(policy.layers)])

    def open(self, keys: Tensor, prompts: list[int]) -> None:
        """Take memory for prompts of these lengths, and for new tokens."""
        head_dim = keys.shape[-1]
        self.backend = backend_for(keys.device)
        self.budgets = [self.policy.budgets(tokens) for tokens in prompts]
        cells = sum(map(self._cells_wanted, prompts, self.budgets))
        slack = 1 + max(SLAB_CELLS % size / SLAB_CELLS for size in self._page_sizes()) * 1.1
        slabs = int(cells * slack) + len(self._page_sizes()) * SLAB_CELLS
        self.pool = Pool(slabs, PageLayout(head_dim).cell_bytes, keys.device)

    def _page_sizes(self) -> set[int]:
        """Cells of all pages that occur."""
        head_dim = self.geometry.head_dim
        stored = {layout_of(option, head_dim).page_cells for option in self.policy.options()}
        return stored | {PageLayout(head_dim).page_cells}

    def _cells_wanted(self, tokens: int, budgets: NDArray[np.int64]) -> int:
        """By one sequence, at its end."""
        head_dim, cells = self.geometry.head_dim, 0
        moved = 0 if self.policy.allocator.name == "as_given" else 1
        for option, count in zip(self.policy.options(), budgets.flat, strict=True):
            layout, exact = layout_of(option, head_dim), exact_tokens(option.keys)
            room = Room.of(option, int(count), tokens) if self.evicts else None
            coded, grown = max(int(count) - exact, 0), exact + self.new_tokens
            if room:
                coded, grown = 0, room.most
            cells += layout.page_cells * (-(-coded // PAGE) + moved)
            cells += PageLayout(head_dim).page_cells * -(-grown // PAGE)
        return cells

    def reserve(self, tokens: int) -> None:
        """Pages for so many more tokens of every row."""
        for layer in self.layers:
            self.make_room(layer.paged, tokens)

    def make_room(self, layer: PagedLayer, tokens: int) -> None:
        """Pages for so many more tokens of a layer's rows; a full pool grows."""
        try:
            layer.reserve(tokens)
        except KvtuneError:
            if self.captured:
                raise
            grown = layer.rows * layer.growing_layout.page_cells * (1 + self.new_tokens // PAGE)
            self.pool.extend(self.policy.layers * grown)
            for other in self.layers:
                other.paged.seal(self.new_tokens)
            layer.reserve(tokens)

    def prompt_bytes(self) -> int:
        """Bytes of the compressed prompts, as formats count them."""
        return sum(layer.paged.prompt_bytes() for layer in self.layers)

    def page_bytes(self) -> int:
        """Bytes of all pages in use."""
        return self.pool.used_bytes

    def kept(self) -> list[list[int]]:
        """Prompt tokens kept, by layer and row."""
        return [list(layer.paged.kept) for layer in self.layers]

    def evicted(self) -> list[list[int]]:
        """Entries that left while tokens were generated, by layer and row."""
        return [layer.paged.evicted.tolist() for layer in self.layers]
