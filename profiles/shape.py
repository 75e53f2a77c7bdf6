"""What a model is, as far as memory and time go: widths, heads, layers, and counts made of them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from kvtune.profiles.layer_cache import LatentAttention, LayerCache
from kvtune.profiles.parameter_counts import Experts, ParameterCounts, StoredWeights

Biases = Literal["none", "qkv", "all"]
_LONGEST_WINDOW = 2**31


@dataclass(frozen=True)
class ModelShape:
    """The shape of a decoder-only language model.

    Args:
        name: canonical name, lower case.
        layers: decoder layers, L.
        query_heads: query heads a layer, Hq.
        kv_heads: KV heads a layer, H (as published; see ``cache_heads`` for latent attention).
        head_dim: width of a head, D.
        hidden_size: width of the residual stream.
        intermediate_size: width of the dense feed-forward block.
        vocab_size: rows of the embedding.
        max_context: tokens that the configuration allows.
        tied_embeddings: whether the output matrix is the embedding.
        windows: a layer's sliding window in tokens, None for full attention; L entries.
        latent: set for multi-head latent attention.
        experts: set for mixtures of experts.
        biases: which attention projections carry a bias.
        query_key_norm: whether queries and keys are normalised, each head by itself unless
            ``norms_over_heads`` says all together, for which GPUs that share a layer have one sum
            more.
        norms_per_layer: norms of hidden width a layer.
        sinks: whether each query head keeps one learned sink logit.
        other_parameters: parameters beside the text model, such as a vision tower.
        rotary_elements: numbers in an engine's tables of rotary embeddings; None for one of all
            positions by the head's width.
        cache: what each layer caches; empty where all layers are alike but for ``windows``.
        counted: parameters as they were counted in the model's own class; None where the fields
            above say them.
        stored: set for checkpoints that are already quantised.
        aliases: other names it is found by.
        source: where the shape was published.
    """

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    latent: LatentAttention | None = None
    experts: Experts | None = None
    biases: Biases = "none"
    query_key_norm: bool = False
    norms_over_heads: bool = False
    norms_per_layer: int = 2
    sinks: bool = False
    other_parameters: int = 0
    rotary_elements: int | None = None
    cache: tuple[LayerCache, ...] = ()
    counted: ParameterCounts | None = None
    stored: StoredWeights | None = None
    aliases: tuple[str, ...] = ()
    source: str = ""

    # --- attention and cache -------------------------------------------------------------

    @property
    def cache_heads(self) -> int:
        """Heads that the cache really holds a layer: 1 for latent attention, else ``kv_heads``."""
        return 1 if self.latent is not None else self.kv_heads

    @functools.cached_property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer caches [L]."""
        if self.cache:
            return self.cache
        heads, key, value = self.kv_heads, self.head_dim, self.head_dim
        if self.latent is not None:
            heads, key, value = 1, self.latent.kv_lora_rank, self.latent.rope_dim
        return tuple(LayerCache(heads, key, value, window) for window in self.windows)

    @functools.cached_property
    def _caches_alike(self) -> dict[LayerCache, int]:
        """The distinct layer caches, each with its number of layers."""
        return dict(Counter(self.layer_caches))

    @property
    def elements_per_token_layer(self) -> int:
        """Cached numbers a token of the layer that caches most of it."""
        return max(layer.elements_per_token for layer in self._caches_alike)

    def kv_bytes_per_token(self, element_bytes: float = 2) -> int:
        """Bytes that one new token adds over all layers, before any window lets go of others."""
        per_token = sum(n * layer.added_per_token for layer, n in self._caches_alike.items())
        return int(per_token * element_bytes)

    def keeps_all(self, context_tokens: int) -> bool:
        """Whether every layer caches keys and values of every token, by the same heads."""
        return self.latent is None and all(
            layer.tokens(context_tokens) == context_tokens
            and (layer.kv_heads, layer.key_dim, layer.value_dim)
            == (self.kv_heads, self.head_dim, self.head_dim)
            and not (layer.state_bytes or layer.index_dim or layer.compress_rate)
            for layer in self._caches_alike
        )

    def kv_bytes(self, context_tokens: int, element_bytes: float = 2) -> int:
        """Bytes of one sequence's full cache, states included; windows hold no more than that."""
        caches = self._caches_alike.items()
        return int(sum(n * layer.bytes(context_tokens, element_bytes) for layer, n in caches))

    def tokens_that_fit(self, cache_bytes: int, element_bytes: float = 2) -> int | None:
        """Longest context whose full cache is within ``cache_bytes``; None where any length is."""
        if self.kv_bytes(1, element_bytes) > cache_bytes:
            return 0
        if self.kv_bytes(2 * _LONGEST_WINDOW, element_bytes) <= cache_bytes:
            grows = self.kv_bytes(2 * _LONGEST_WINDOW) > self.kv_bytes(_LONGEST_WINDOW)
            if not grows:
                return None
        low, high = 1, 8 * cache_bytes  # a token takes at least a bit
        while low < high:
            middle = (low + high + 1) // 2
            if self.kv_bytes(middle, element_bytes) <= cache_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    # --- parameters ----------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """All parameters, counted from the shape; tied matrices once."""
        return self.parameter_counts().total

    @property
    def active_parameters(self) -> int:
        """Parameters of the text model that one token is multiplied with, output matrix included.

        The embedding is a look-up and is not among them unless it is the output matrix too.
        """
        counts = self.parameter_counts()
        share = self.experts.active / self.experts.count if self.experts else 0.0
        head = self.vocab_size * self.hidden_size
        return counts.attention + counts.feed_forward + int(counts.experts * share) + head

    def parameter_counts(self) -> ParameterCounts:
        """Parameters by kind. Tested against the totals that the publishers state."""
        if self.counted is not None:
            return self.counted
        table = self.vocab_size * self.hidden_size
        moe_layers = self.layers - self.experts.dense_layers if self.experts else 0
        dense = (self.layers - moe_layers) * self.intermediate_size
        shared = moe_layers * (self.experts.shared_size if self.experts else 0)
        return ParameterCounts(
            embedding=table,
            head=0 if self.tied_embeddings else table,
            attention=self.layers * self._attention_matrices(),
            feed_forward=3 * self.hidden_size * (dense + shared),
            experts=moe_layers * self._expert_matrices(),
            small=self._small_parameters(moe_layers),
            other=self.other_parameters,
        )

    def _attention_matrices(self) -> int:
        width = self.hidden_size
        if self.latent is None:
            return 2 * width * self.head_dim * (self.query_heads + self.kv_heads)
        latent, heads = self.latent, self.query_heads
        query_out = heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.query_lora_rank
        query = width * query_out if rank is None else rank * (width + query_out)
        down = width * (latent.kv_lora_rank + latent.rope_dim)
        up = latent.kv_lora_rank * heads * (latent.nope_dim + latent.value_dim)
        return query + down + up + heads * latent.value_dim * width

    def _expert_matrices(self) -> int:
        if self.experts is None:
            return 0
        return self.experts.count * 3 * self.hidden_size * self.experts.intermediate_size

    def _small_parameters(self, moe_layers: int) -> int:
        layer = self.norms_per_layer * self.hidden_size
        if self.biases != "none":
            layer += (self.query_heads + 2 * self.kv_heads) * self.head_dim
        if self.biases == "all":
            layer += self.hidden_size
        if self.query_key_norm:
            layer += 2 * self.head_dim
        if self.sinks:
            layer += self.query_heads
        if self.latent is not None:
            layer += self.latent.kv_lora_rank + (self.latent.query_lora_rank or 0)
        return self.layers * layer + self.hidden_size + moe_layers * self._router_parameters()

    def _router_parameters(self) -> int:
        experts = self.experts
        if experts is None:
            return 0
        count = experts.count * self.hidden_size
        if experts.biases:
            count += experts.count * (1 + 2 * experts.intermediate_size + self.hidden_size)
        if experts.score_correction:
            count += experts.count
        if experts.shared_gate:
            count += self.hidden_size
        return count


def alternating_windows(
    layers: int, window: int | None, full_every: int | None
) -> tuple[int | None, ...]:
    """Windows where every ``full_every``-th layer (the last of each group) attends to everything.

    Without ``full_every`` all layers slide; without ``window`` none does.
    """
    if window is None:
        return (None,) * layers
    if full_every is None:
        return (window,) * layers
    return tuple(None if (i + 1) % full_every == 0 else window for i in range(layers))
