"""Tensor parallelism: the share of a model that one of several GPUs holds."""

from __future__ import annotations

from dataclasses import replace

from kvtune.common.errors import KvtuneError
from kvtune.profiles.layer_cache import LayerCache
from kvtune.profiles.parameter_counts import ParameterCounts, StoredWeights
from kvtune.profiles.shape import ModelShape


def can_split(shape: ModelShape, gpus: int) -> bool:
    """Whether so many GPUs can share each layer evenly."""
    return gpus == 1 or _divides(shape, gpus)


def check_dealt(shape: ModelShape, gpus: int, groups: int) -> None:
    """Refuse groups of GPUs that a model's routed experts cannot be dealt to; one group has all.

    Raises:
        KvtuneError: it has none, or GPUs or experts do not divide into so many groups.
    """
    if groups == 1:
        return
    if shape.experts is None:
        raise KvtuneError(
            f"{shape.name} has no routed experts to deal to {groups} groups of GPUs",
            hint="leave out --expert-parallel, or vLLM's --enable-expert-parallel.",
        )
    if gpus % groups or shape.experts.count % groups:
        raise KvtuneError(
            f"{shape.experts.count} experts on {gpus} GPUs cannot be dealt to {groups} groups",
            hint="--expert-parallel divides both, for example as many as --gpus.",
        )


def split_over(shape: ModelShape, gpus: int) -> ModelShape:
    """The shape of one GPU's share, as vLLM, SGLang and TensorRT-LLM split a model.

    Query heads, feed-forward widths, experts' widths and the vocabulary are divided. KV heads are
    divided where they can be; where there are fewer than GPUs, each GPU holds one and some hold the
    same. The latent of multi-head latent attention, norms and routers are held by every GPU.

    Args:
        shape: the whole model.
        gpus: that share each layer, at least 1.

    Raises:
        KvtuneError: the query heads, or the KV heads, cannot be shared evenly by so many GPUs.
    """
    if gpus == 1:
        return shape
    if shape.query_heads % gpus or (shape.kv_heads % gpus and gpus % shape.kv_heads):
        heads = f"{shape.query_heads} query and {shape.kv_heads} KV heads"
        possible = [n for n in range(1, shape.query_heads + 1) if _divides(shape, n)]
        raise KvtuneError(
            f"{shape.name} has {heads}, which {gpus} GPUs cannot share evenly",
            hint=f"possible: {', '.join(map(str, possible))}",
        )
    experts = shape.experts and replace(
        shape.experts,
        intermediate_size=-(-shape.experts.intermediate_size // gpus),
        shared_size=-(-shape.experts.shared_size // gpus),
    )
    return replace(
        shape,
        query_heads=shape.query_heads // gpus,
        kv_heads=max(1, shape.kv_heads // gpus),
        intermediate_size=-(-shape.intermediate_size // gpus),
        vocab_size=-(-shape.vocab_size // gpus),
        experts=experts,
        other_parameters=-(-shape.other_parameters // gpus),
        cache=tuple(_share_of_cache(layer, gpus, shape) for layer in shape.cache),
        counted=shape.counted and _share_of_counts(shape.counted, gpus),
        stored=shape.stored and _share_of_stored(shape, shape.stored, gpus),
    )


def _share_of_cache(layer: LayerCache, gpus: int, shape: ModelShape) -> LayerCache:
    """One GPU's part of a layer: a latent is held whole, states are divided by their heads."""
    heads = layer.kv_heads
    if heads and shape.latent is None:
        if heads % gpus and gpus % heads:
            raise KvtuneError(
                f"a layer of {shape.name} has {heads} KV heads, which {gpus} GPUs cannot share"
            )
        heads = max(1, heads // gpus)
    divided = ("state_bytes", "conv_channels", "recurrent_elements")
    parts = {name: -(-getattr(layer, name) // gpus) for name in divided}
    return replace(layer, kv_heads=heads, **parts)


def _share_of_counts(counts: ParameterCounts, gpus: int) -> ParameterCounts:
    """One GPU's matrices; norms, biases and routers are held by every GPU."""
    divided = {
        name: -(-getattr(counts, name) // gpus)
        for name in ParameterCounts.__dataclass_fields__
        if name != "small"
    }
    return replace(counts, **divided)


def _share_of_stored(shape: ModelShape, stored: StoredWeights, gpus: int) -> StoredWeights:
    """One GPU's bytes of a quantised checkpoint, norms and routers held by every GPU."""
    whole = 2 * shape.parameter_counts().small

    def share(size: float) -> float:
        return min(size, whole) + max(0.0, size - whole) / gpus

    return replace(
        stored, bytes=share(stored.bytes), low=share(stored.low), high=share(stored.high)
    )


def _divides(shape: ModelShape, gpus: int) -> bool:
    return shape.query_heads % gpus == 0 and (
        shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0
    )
