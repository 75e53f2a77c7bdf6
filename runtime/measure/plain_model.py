"""A decoder of Llama's kind with random weights and a plain loop: what whole steps are timed on.

Each piece is a function, and the profile times these very functions one by one. The cache has
exactly the asked length; a step overwrites its last token, so every step reads as many bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvtune.profiles.shape import ModelShape

EPSILON = 1e-5
ROPE_BASE = 500_000.0


def random_tensor(*size: int, device: str, scale: float = 0.02) -> Tensor:
    """Normal bf16 numbers; zeros and repeated data would make a GPU draw less and run faster."""
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, scale)


def rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm of each row of ``hidden [M, width]``."""
    return F.rms_norm(hidden, (weight.shape[0],), weight, EPSILON)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions; ``heads [M, heads, D]``, ``cosine`` and ``sine [M or 1, 1, D]``."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(heads * cosine, turned, sine)


def gated(both: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[M, 2 x width]``."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def append(cache: Tensor, new: Tensor) -> Tensor:
    """Write ``new [B, H, D]`` over the last token of ``cache [B, H, N, D]``."""
    return cache[:, :, -1].copy_(new)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Unmasked attention of one token; ``query [B, Hq, D]``, ``keys`` and ``values [B, H, N, D]``.

    The query heads of a KV head are given as rows of one query, so that each key is read once.
    """
    batch, heads, _, width = keys.shape
    grouped = query.reshape(batch, heads, -1, width)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(batch, -1)


def likeliest(logits: Tensor) -> Tensor:
    """``[B]`` from ``[B, vocabulary]``."""
    return logits.argmax(dim=-1)


def rotary_tables(position: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[1, 1, D]`` of one position, in bf16."""
    steps = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angles = position * ROPE_BASE**-steps
    doubled = torch.cat((angles, angles))[None, None]
    return doubled.cos().bfloat16(), doubled.sin().bfloat16()


@dataclass
class Layer:
    """Weights of one layer; each matrix is ``[out, in]``."""

    query_key_value: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]


def random_layer(shape: ModelShape, device: str) -> Layer:
    """One layer's weights, drawn anew."""
    width, inner = shape.hidden_size, shape.intermediate_size
    queries = shape.query_heads * shape.head_dim
    projected = queries + 2 * shape.kv_heads * shape.head_dim
    ones = [torch.ones(width, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return Layer(
        random_tensor(projected, width, device=device),
        random_tensor(width, queries, device=device),
        random_tensor(2 * inner, width, device=device),
        random_tensor(width, inner, device=device),
        (ones[0], ones[1]),
    )


class PlainDecoder:
    """Weights once, caches of any size after one another.

    Args:
        shape: the model: dense, grouped-query attention, no windows, no biases.
        device: where.
        layers: of them, where not all are wanted.
    """

    def __init__(self, shape: ModelShape, device: str, layers: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.layers = [random_layer(shape, device) for _ in range(layers or shape.layers)]
        self.embedding = random_tensor(shape.vocab_size, shape.hidden_size, device=device)
        self.head = (
            self.embedding
            if shape.tied_embeddings
            else random_tensor(shape.vocab_size, shape.hidden_size, device=device)
        )
        self.norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16, device=device)
        self.caches: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.zeros(1, dtype=torch.long, device=device)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, counted on the tensors."""
        parts = [self.embedding, self.norm]
        parts += [] if self.head is self.embedding else [self.head]
        for layer in self.layers:
            parts += [layer.query_key_value, layer.output, layer.gate_up, layer.down, *layer.norms]
        return sum(part.nbytes for part in parts)

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values, counted on the tensors."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.caches)

    def hold(self, batch: int, length: int) -> None:
        """Replace the cache by a random one of ``batch`` sequences of ``length`` tokens."""
        self.caches = []  # let go of the old one before the new one is made
        size = (batch, self.shape.kv_heads, length, self.shape.head_dim)
        for _ in self.layers:
            keys, values = (random_tensor(*size, device=self.device, scale=1.0) for _ in range(2))
            self.caches.append((keys, values))
        self.tokens = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.cosine, self.sine = rotary_tables(length, self.shape.head_dim, self.device)

    def step(self) -> Tensor:
        """One token for every sequence. Changes the caches' last token and ``tokens``."""
        hidden = F.embedding(self.tokens, self.embedding)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            hidden = self.run_layer(hidden, layer, cache)
        logits = F.linear(rms_norm(hidden, self.norm), self.head)
        # A kernel, not a copy: a graph's copy node goes to another engine of the GPU and back.
        return torch.add(likeliest(logits), 0, out=self.tokens)

    def run_layer(self, hidden: Tensor, layer: Layer, cache: tuple[Tensor, Tensor]) -> Tensor:
        """``hidden [B, width]`` through attention and feed-forward."""
        shape, rows = self.shape, hidden.shape[0]
        queries, heads = shape.query_heads, shape.query_heads + shape.kv_heads
        projected = F.linear(rms_norm(hidden, layer.norms[0]), layer.query_key_value)
        all_heads = projected.view(rows, heads + shape.kv_heads, shape.head_dim)
        turned = rotate(all_heads[:, :heads], self.cosine, self.sine)
        append(cache[0], turned[:, queries:])
        append(cache[1], all_heads[:, heads:])
        mixed = attend(turned[:, :queries], *cache)
        hidden = hidden + F.linear(mixed, layer.output)
        inner = gated(F.linear(rms_norm(hidden, layer.norms[1]), layer.gate_up))
        return hidden + F.linear(inner, layer.down)
