"""How long a decode step and a prefill take: bytes, floors and formats, each with its interval.

Where the card, or one of its architecture, was measured, a step is put together from its kernels;
else from its datasheet: the sum over layers of attention and matrices, the output matrix and the
host's share. Every answer says its tier. Arrays go in and come out; nothing here loops over
configurations, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Union, get_args

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.policies.format import find_format
from kvtune.profiles.gpus import GpuProfile
from kvtune.profiles.shape import ModelShape
from kvtune.simulator.latency import priors, terms
from kvtune.simulator.latency.answers import TIERS, Answer, FloatArray, Times
from kvtune.simulator.latency.measured import measured_steps
from kvtune.simulator.latency.parts import covers, prefill_covers
from kvtune.simulator.latency.prefills import measured_prefills, runtime_prefills
from kvtune.simulator.latency.runtime import runtime_steps
from kvtune.simulator.latency.transfer import tables_for
from kvtune.simulator.memory.weights import WeightFormat, check_format

Execution = Literal["runtime", "graph", "eager"]
CacheBytes = Union[npt.ArrayLike, Mapping[str, npt.ArrayLike]]  # noqa: UP007 (runtime, 3.10)


def decode_step(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    batch: int,
    cache_bytes_per_sequence: float | Mapping[str, float],
    execution: Execution = "graph",
) -> Estimate:
    """One decode step of a batch, in seconds; see :func:`decode_steps`."""
    times = decode_steps(shape, gpu, weight_format, batch, cache_bytes_per_sequence, execution)
    return times.at()


def decode_steps(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    batch: npt.ArrayLike,
    cache_bytes_per_sequence: CacheBytes,
    execution: Execution = "graph",
    measured: bool = True,
) -> Times:
    """Decode steps of many configurations: one new token for each sequence of the batch.

    Args:
        shape: the model.
        gpu: the card.
        weight_format: how the matrices are stored.
        batch: sequences, at least 1; broadcast against the bytes.
        cache_bytes_per_sequence: bytes of cache that a step reads for one sequence, over all
            layers, scales and indices included. A plain array is bf16; a mapping gives the bytes
            by the name of their format, for example ``{"bf16": recent, "int4": older}``, since
            each format is read by a kernel of its own.
        execution: ``graph`` (plain modules, one launch a step), ``eager`` (host-bound), or
            ``runtime`` (kvtune's own, as it was measured; where it was not, ``graph``).
        measured: whether measured kernels may be used; without them the datasheet answers.

    Returns:
        Times of the broadcast shape.

    Raises:
        KvtuneError: a batch below 1, negative bytes, an unknown format or execution.
    """
    check_format(weight_format)
    _check_execution(execution)
    sequences, cache = _configurations(batch, cache_bytes_per_sequence)
    tables = tables_for(gpu) if measured else None
    if tables and execution != "eager" and covers(tables.kernels, shape):
        asked = tables, gpu, shape, weight_format, sequences, cache
        answer = runtime_steps(*asked) if execution == "runtime" else None
        return _times(answer or measured_steps(*asked))
    device = [
        terms.larger(
            terms.cache_read(gpu, sequences, cache),
            terms.decode_attention(shape, gpu, sequences, cache),
        ),
        terms.floor(priors.ATTENTION_FLOOR_S, shape.layers),
        terms.floor(priors.ATTENTION_PER_SEQUENCE_S, shape.layers * sequences),
        terms.matrices(shape, gpu, weight_format, sequences, logits=sequences),
        terms.floor(terms.layer_floor(shape), shape.layers),
    ]
    return _with_host(device, shape, execution)


def prefill(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    prompt_tokens: int,
    batch: int = 1,
    execution: Execution = "graph",
) -> Estimate:
    """The prefill of a batch of prompts, in seconds; see :func:`prefills`."""
    return prefills(shape, gpu, weight_format, prompt_tokens, batch, execution).at()


def prefills(
    shape: ModelShape,
    gpu: GpuProfile,
    weight_format: WeightFormat,
    prompt_tokens: npt.ArrayLike,
    batch: npt.ArrayLike = 1,
    execution: Execution = "graph",
    measured: bool = True,
) -> Times:
    """Prefills of many configurations: dense attention over the whole prompt, no cache policy.

    Args:
        shape: the model.
        gpu: the card.
        weight_format: how the matrices are stored; int8 and int4 are widened and computed in bf16.
        prompt_tokens: P, at least 1; broadcast against ``batch``.
        batch: prompts, at least 1.
        execution: as a decode step's; the host is waited for only in short prompts.
        measured: whether measured kernels may be used; without them the datasheet answers.

    Returns:
        Times of the broadcast shape.

    Raises:
        KvtuneError: a number below 1, an unknown format or execution.
    """
    check_format(weight_format)
    _check_execution(execution)
    prompt, sequences = np.broadcast_arrays(
        _at_least(prompt_tokens, 1, "prompt tokens"), _at_least(batch, 1, "batch")
    )
    tables = tables_for(gpu) if measured and weight_format == "bf16" else None
    if tables and execution != "eager" and prefill_covers(tables.kernels, shape):
        asked = tables, shape, prompt, sequences
        answer = runtime_prefills(*asked) if execution == "runtime" else None
        return _times(answer or measured_prefills(*asked))
    device = [
        terms.matrices(shape, gpu, weight_format, prompt * sequences, logits=sequences),
        terms.prompt_attention(shape, gpu, prompt, sequences),
        terms.floor(priors.ATTENTION_FLOOR_S, shape.layers),
        terms.floor(terms.layer_floor(shape), shape.layers),
    ]
    return _with_host(device, shape, execution)


# --- inputs and the host -----------------------------------------------------------------------


def _configurations(
    batch: npt.ArrayLike, cache_bytes: CacheBytes
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Batch sizes and bytes by format, broadcast against each other."""
    by_format = cache_bytes if isinstance(cache_bytes, Mapping) else {"bf16": cache_bytes}
    if not by_format:
        raise KvtuneError("cache bytes by format need at least one format")
    for name in by_format:
        find_format(name)
    arrays = np.broadcast_arrays(
        _at_least(batch, 1, "batch"), *(_at_least(v, 0, "cache bytes") for v in by_format.values())
    )
    return arrays[0], dict(zip(by_format, arrays[1:], strict=True))


def _check_execution(execution: str) -> None:
    if execution not in get_args(Execution):
        raise KvtuneError(f"execution is {', '.join(get_args(Execution))}; not {execution!r}")


def _times(answer: Answer) -> Times:
    """With the tier of the least certain one for the whole."""
    worst = TIERS[int(np.max(answer.tiers))]
    return Times(answer.value, answer.low, answer.high, worst, answer.tiers)


def _at_least(values: npt.ArrayLike, minimum: float, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if not np.all(array >= minimum):  # also false for nan
        raise KvtuneError(f"{name} must be at least {minimum:g}")
    return array


def _with_host(device: list[terms.Term], shape: ModelShape, execution: Execution) -> Times:
    """Graph: the host's launch and sampler are added. Eager: the slower of host and GPU counts."""
    if execution != "eager":
        return Times(*terms.total([*device, terms.floor(priors.GRAPH_HOST_S)]))
    host = terms.floor(priors.EAGER_HOST_LAYER_S, shape.layers)
    step = terms.floor(priors.EAGER_HOST_STEP_S)
    waiting = terms.Term(*(a + b for a, b in zip(host, step, strict=True)))
    return Times(*terms.larger(terms.total(device), waiting))
