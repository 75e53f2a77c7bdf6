"""What a model is, as far as memory and time go: widths, heads, layers, and counts made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["full", "sliding", "latent"]
Biases = Literal["none", "qkv", "all"]


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one latent a token is cached.

    Args:
        kv_lora_rank: width of the latent that keys and values are made from.
        rope_dim: width of the rotary key that all heads share, cached beside the latent.
        nope_dim: width a head of the key part without positions.
        value_dim: width a head of the values.
        query_lora_rank: width of the queries' latent; None where queries are projected directly.
    """

    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_lora_rank: int | None = None


@dataclass(frozen=True)
class Experts:
    """Routed feed-forward blocks.

    Args:
        count: routed experts a layer.
        active: routed experts that a token visits.
        intermediate_size: width of one expert.
        shared_size: total width of the experts that every token visits, 0 for none.
        dense_layers: first layers that have an ordinary feed-forward block instead.
        biases: whether expert and router projections carry biases (gpt-oss).
        score_correction: whether the router keeps one correction an expert (DeepSeek-V3).
        shared_gate: whether a gate of one output weighs the shared expert (Qwen2-MoE).
    """

    count: int
    active: int
    intermediate_size: int
    shared_size: int = 0
    dense_layers: int = 0
    biases: bool = False
    score_correction: bool = False
    shared_gate: bool = False


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by what becomes of them: which are quantised, which are read at every token.

    Args:
        embedding: the input table; one row a token is read.
        head: the output matrix; 0 where it is the embedding itself.
        attention: attention projections of all layers.
        feed_forward: dense and shared feed-forward matrices of all layers.
        experts: routed experts of all layers.
        small: norms, biases, routers, sinks: always 16 bits.
        other: towers beside the text model (vision), loaded but not read at decoding.
    """

    embedding: int
    head: int
    attention: int
    feed_forward: int
    experts: int
    small: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.sixteen_bit + self.matrices

    @property
    def matrices(self) -> int:
        """Those that a weight format quantises."""
        return self.attention + self.feed_forward + self.experts

    @property
    def sixteen_bit(self) -> int:
        """Those that stay at 16 bits in every weight format."""
        return self.embedding + self.head + self.small + self.other


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
        query_key_norm: whether queries and keys are normalised a head.
        norms_per_layer: norms of hidden width a layer.
        sinks: whether each query head keeps one learned sink logit.
        other_parameters: parameters beside the text model, such as a vision tower.
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
    norms_per_layer: int = 2
    sinks: bool = False
    other_parameters: int = 0
    aliases: tuple[str, ...] = ()
    source: str = ""

    # --- attention and cache -------------------------------------------------------------

    def attention_kind(self, layer: int) -> AttentionKind:
        """What the layer attends to: everything, a window, or latents of everything."""
        if self.latent is not None:
            return "latent"
        return "full" if self.windows[layer] is None else "sliding"

    @property
    def cache_heads(self) -> int:
        """Heads that the cache really holds a layer: 1 for latent attention, else ``kv_heads``."""
        return 1 if self.latent is not None else self.kv_heads

    @property
    def elements_per_token_layer(self) -> int:
        """Cached numbers a token and layer: keys and values, or one latent and its rotary key."""
        if self.latent is not None:
            return self.latent.kv_lora_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, element_bytes: float = 2) -> int:
        """Bytes that one new token adds over all layers, before any window lets go of others."""
        return int(self.layers * self.elements_per_token_layer * element_bytes)

    def cached_tokens(self, layer: int, context_tokens: int) -> int:
        """Tokens of a context that the layer keeps: all, or its window's worth."""
        window = self.windows[layer]
        return context_tokens if window is None else min(context_tokens, window)

    def lets_go(self, context_tokens: int) -> bool:
        """Whether any layer's window is shorter than a context, so that it forgets by itself."""
        return any(w is not None and w < context_tokens for w in self.windows)

    def kv_bytes(self, context_tokens: int, element_bytes: float = 2) -> int:
        """Bytes of one sequence's full cache; sliding layers hold no more than their window."""
        kept = sum(self.cached_tokens(layer, context_tokens) for layer in range(self.layers))
        return int(kept * self.elements_per_token_layer * element_bytes)

    def tokens_that_fit(self, cache_bytes: int, element_bytes: float = 2) -> int:
        """Longest context whose full cache is within ``cache_bytes``; at most 2**40 tokens."""
        if self.kv_bytes(1, element_bytes) > cache_bytes:
            return 0
        low, high = 1, 2**40
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
