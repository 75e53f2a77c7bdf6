"""The parameters of a model by kind, and the formats that a checkpoint holds them in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture's feed-forward blocks.

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
        unknown: the most that towers may have that could not be counted; not in the total.
    """

    embedding: int
    head: int
    attention: int
    feed_forward: int
    experts: int
    small: int
    other: int
    unknown: int = 0

    @property
    def total(self) -> int:
        """All parameters that could be counted."""
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
class StoredWeights:
    """Weights as a checkpoint holds them, where it is already quantised.

    Args:
        name: the format, as people call it: ``fp8``, ``mxfp4``, ``gptq int4``, ``Q4_K``.
        bits: of one weight of a quantised matrix, with its share of scales.
        bytes: of all weights.
        low: the least that they may be; equals ``bytes`` where the files were measured.
        high: the most.
    """

    name: str
    bits: float
    bytes: float
    low: float
    high: float
