"""A tuned plan in transformers: a cache that ``model.generate`` accepts, stored in pages.

::

    from kvtune.runtime import load_cache
    cache = load_cache("policy.yaml", model)
    model.generate(**inputs, past_key_values=cache)

The first forward pass is the prompt, in one piece; sequences of different lengths are padded on
the left. When a layer has answered it, each KV head's tokens are chosen and stored and the rest is
dropped, so that one layer at a time is uncompressed. From then on tokens come one by one.

What was evicted is gone: the cache cannot be cropped, prefix reuse would give the next user a
prompt that was compressed for this one (store prompts, not caches), and a prompt in chunks would
be chosen from before it was read to its end. These are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtune.common.errors import KvtuneError
from kvtune.policies.compress import select
from kvtune.policies.document_reader import read_policy
from kvtune.policies.policy import Policy
from kvtune.policies.signals import Signals
from kvtune.runtime.backend import Backend, TritonBackend, backend_for
from kvtune.runtime.kernels.launch import Scratch
from kvtune.runtime.kernels.layout import PAGE, PageLayout, exact_tokens, layout_of
from kvtune.runtime.paged import PagedLayer
from kvtune.runtime.pool import SLAB_CELLS, Pool
from kvtune.traces.geometry import Geometry, read_geometry
from kvtune.traces.seam import causal_attention, refuse_unknown

NAME = "kvtune_paged"
"""The attention implementation that hands queries to the cache."""


def load_cache(policy: Path | str | Policy, model: Any, *, new_tokens: int = 1024) -> PolicyCache:
    """A cache for one ``generate`` under a policy; the model answers through it from now on.

    Args:
        policy: a policy file, or a policy.
        model: a transformers causal language model with plain attention.
        new_tokens: to make room for at first; more is made when they are exceeded.

    Raises:
        KvtuneError: unreadable policy, another model's shape, an unsupported format or head.
    """
    config = model.config.get_text_config()
    shape = config.num_hidden_layers, config.num_key_value_heads
    bound = policy if isinstance(policy, Policy) else read_policy(policy).bind(*shape)
    bound.check_fits(*shape)
    _refuse_other_passes(bound)
    geometry = read_geometry(model)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _padding)
    model.set_attn_implementation(NAME)
    return PolicyCache(bound, geometry, new_tokens)


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

    def __init__(self, policy: Policy, geometry: Geometry, new_tokens: int = 1024) -> None:
        """Hold nothing yet: memory is taken when the prompt's length is known."""
        self.policy, self.geometry, self.new_tokens = policy, geometry, new_tokens
        self.pool: Pool
        self.backend: Backend
        self.scratch: Scratch | None = None
        self.captured = False  # by a graph: counting and reserving is then the decode loop's
        super().__init__(layers=[_Layer(self, n) for n in range(policy.layers)])

    def open(self, keys: Tensor, prompts: list[int]) -> None:
        """Take memory for prompts of these lengths, and for new tokens."""
        head_dim = keys.shape[-1]
        self.backend = backend_for(keys.device)
        cells = self._cells_wanted(prompts, head_dim)
        self.pool = Pool(cells, PageLayout(head_dim).cell_bytes, keys.device)
        self.budgets = [self.policy.budgets(tokens) for tokens in prompts]

    def _cells_wanted(self, prompts: list[int], head_dim: int) -> int:
        growing = PageLayout(head_dim).page_cells
        cells, sizes = 0, {growing}
        for tokens in prompts:
            kept = self.policy.budgets(tokens).flat
            for option, count in zip(self.policy.options(), kept, strict=True):
                layout, exact = layout_of(option, head_dim), exact_tokens(option.keys)
                sizes.add(layout.page_cells)
                moved = 0 if self.policy.allocator.name == "as_given" else 1
                cells += layout.page_cells * (-(-max(int(count) - exact, 0) // PAGE) + moved)
                cells += growing * -(-(exact + self.new_tokens) // PAGE)
        slack = 1 + max(SLAB_CELLS % size / SLAB_CELLS for size in sizes) * 1.1
        return int(cells * slack) + len(sizes) * SLAB_CELLS

    def reserve(self, tokens: int) -> None:
        """Pages for so many more tokens of every row."""
        for layer in self.layers:
            self._reserve(layer.paged, tokens)

    def _reserve(self, layer: PagedLayer, tokens: int) -> None:
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


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer, as transformers knows them; ``attention`` finds it by the keys it returns."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PolicyCache, number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number
        self.paged: PagedLayer
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are taken when the prompt has been seen."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new tokens on to ``attention``, which stores them."""
        if self.seen and key_states.shape[-2] > 1:
            raise KvtuneError(
                "after the prompt, a compressed cache takes one token at a time",
                hint="no prefill in chunks, no assisted generation.",
            )
        self.seen += key_states.shape[-2] * (not self.cache.captured)
        keys: Any = key_states.view_as(key_states)
        keys.paged_cache_layer = self
        return keys, value_states

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, scale: float) -> Any:
        """Causal attention of each prompt on its own, ``[B, Hq, P, D]``; then store it."""
        tokens = [k.shape[2]] * len(k) if padding is None else padding.sum(1).tolist()
        if self.number == 0:
            self.cache.open(k, tokens)
        cache = self.cache
        self.paged = PagedLayer(
            self.number, cache.policy.heads[self.number], k.shape[-1], len(k), cache.pool,
            cache.backend,
        )  # fmt: skip
        output = torch.zeros_like(q)
        for row, count in enumerate(tokens):
            real = slice(k.shape[2] - count, None)
            one = [x[row : row + 1, :, real] for x in (q, k, v)]
            output[row, :, real] = causal_attention(one[0], one[1], one[2], scale, None)[0]
            self._store(row, one[0][0], one[1][0], one[2][0], scale)
        self.paged.seal(cache.new_tokens)
        cache._reserve(self.paged, PAGE)
        return output

    def _store(self, row: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        policy, budgets = self.cache.policy, self.cache.budgets[row][self.number].tolist()
        sums = None
        if policy.needs.column_sums and isinstance(self.cache.backend, TritonBackend):
            from kvtune.runtime.kernels.columns import column_sums

            sums = column_sums(q.contiguous(), k.contiguous(), scale)
        rope = self.cache.geometry.rope_at(self.number)
        signals = Signals(q, k, v, scale, sums, layer=self.number, rope=rope)
        options = policy.heads[self.number]
        chosen = select([options], [policy.split(self.number, budgets, signals)], signals)
        kept = [row[:n] for row, n in zip(chosen.indices[0], chosen.sizes[0], strict=True)]
        self.paged.store(row, k.contiguous(), v.contiguous(), kept)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append one token a sequence and attend, ``[B, Hq, 1, D]``."""
        layer, cache = self.paged, self.cache
        if not cache.captured:
            cache._reserve(layer, 1)
        layer.append(k[:, :, 0], v[:, :, 0])
        if not cache.captured:
            layer.count_appended()
        queries = q.reshape(layer.rows, -1, q.shape[-1])
        return layer.attend(queries, self._scratch(queries), scale).view_as(q)

    def _scratch(self, queries: Tensor) -> Scratch:
        """One for all layers, as large as the largest has needed."""
        cache, rows, group = self.cache, self.paged.rows, queries.shape[1]
        if cache.scratch is None or len(cache.scratch.lse) < self.paged.slots:
            slots = max(layer.paged.slots for layer in cache.layers)
            cache.scratch = Scratch(rows, slots, group, queries.shape[2], queries.device)
        return cache.scratch

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers continues counting from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the mask that transformers would make."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, max_length: int) -> None:
        """Not possible."""
        raise KvtuneError("a compressed prompt cannot be cropped: what was evicted is gone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not possible."""
        raise KvtuneError("no beam search with a compressed prompt")

    def reset(self) -> None:
        """Not possible: make a new cache."""
        raise KvtuneError("a compressed cache serves one batch of prompts; load another")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: the prompt, then one token at a time, ``[B, T, Hq, D]``."""
    refuse_unknown(extras)
    layer: _Layer | None = getattr(key, "paged_cache_layer", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if layer is None:
        raise KvtuneError(
            "this model answers through a compressed cache, and was given none",
            hint="give past_key_values=load_cache(policy, model) to every generate.",
        )
    if sliding_window is not None and sliding_window < layer.seen:
        raise KvtuneError(
            f"layer {layer.number} attends to a window of {sliding_window} tokens",
            hint="only full attention can be compressed.",
        )
    with torch.no_grad():
        if layer.seen == query.shape[2] and not layer.cache.captured:
            output = layer.prompt(query, key, value, attention_mask, scale)
        else:
            output = layer.step(query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


def _padding(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask that ``attention`` gets: which tokens are real ``[B, T]``, padded on the left."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask.diff(dim=1) < 0).any()):
        raise KvtuneError("prompts of different lengths must be padded on the left")
    return attention_mask.bool()
