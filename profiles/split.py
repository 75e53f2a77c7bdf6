"""Tensor parallelism: the share of a model that one of several GPUs holds."""

from __future__ import annotations

from dataclasses import replace

from kvtune.common.errors import KvtuneError
from kvtune.profiles.shape import ModelShape


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
    )


def _divides(shape: ModelShape, gpus: int) -> bool:
    return shape.query_heads % gpus == 0 and (
        shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0
    )
