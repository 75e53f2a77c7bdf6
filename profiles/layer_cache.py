"""What one layer of a model caches of a sequence."""

from __future__ import annotations

from dataclasses import dataclass


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
class LayerCache:
    """What one layer caches of one sequence.

    Args:
        kv_heads: heads whose keys and values are cached; 0 for a layer that caches none of its
            own: a linear, convolutional or feed-forward layer, or one that reads another's cache.
        key_dim: cached numbers of a key, of a head and token; of a latent its own width.
        value_dim: the same of a value; of a latent the width of its rotary key.
        window: tokens that are kept; None for all.
        state_bytes: recurrent and convolutional state, whatever the length.
        conv_channels: of that, channels whose last inputs a convolution keeps; 0 where not known.
        conv_width: inputs of a channel that the convolution spans.
        recurrent_elements: numbers of the recurrent state.
        recurrent_bytes: of such a number in engines that serve the model, as its configuration
            asks: 4 for float32, 2 where it asks for nothing.
        index_dim: cached numbers of a token's index key (DeepSeek sparse attention).
        compress_rate: tokens that one entry stands for beside the window (DeepSeek-V4); 0 without.
        compressed_dim: cached numbers of such an entry.
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    state_bytes: int = 0
    conv_channels: int = 0
    conv_width: int = 0
    recurrent_elements: int = 0
    recurrent_bytes: int = 2
    index_dim: int = 0
    compress_rate: int = 0
    compressed_dim: int = 0

    @property
    def elements_per_token(self) -> int:
        """Numbers that the layer caches for each token."""
        return self.kv_heads * (self.key_dim + self.value_dim) + self.index_dim

    def tokens(self, context_tokens: int) -> int:
        """Tokens of a context that are kept."""
        return context_tokens if self.window is None else min(context_tokens, self.window)

    def bytes(self, context_tokens: int, element_bytes: float) -> float:
        """Bytes of one sequence of a context."""
        kept = self.tokens(context_tokens) * self.elements_per_token
        if self.compress_rate:
            kept += context_tokens // self.compress_rate * self.compressed_dim
        return kept * element_bytes + self.state_bytes

    @property
    def added_per_token(self) -> float:
        """Numbers that one more token adds on average, before a window lets go of others."""
        rate = self.compress_rate
        return self.elements_per_token + (self.compressed_dim / rate if rate else 0.0)
