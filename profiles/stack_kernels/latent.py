"""Multi-head latent attention of a layer by the stacks' tables.

SGLang and TensorRT-LLM have the kernel alone, beside the two products that bring queries into the
latent and values out of it; vLLM has a whole layer's attention, projections included. All are of
the widths of DeepSeek-V3, which Kimi K2 shares.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError
from kvtune.profiles.elsewhere import StackTables, Table
from kvtune.profiles.shape import ModelShape
from kvtune.profiles.stack_kernels.attention import (
    Kind,
    attention_features,
    attention_points,
)
from kvtune.profiles.stack_kernels.curve import Curve
from kvtune.profiles.stack_kernels.grid import FloatArray, GeometryGrid, fit_grids

_KERNEL_FILES = {"generation": "generation_mla_perf", "context": "context_mla_perf"}
_LAYER_FILES = {"generation": "mla_generation_module_perf", "context": "mla_context_module_perf"}
_WIDTHS = (512, 64, 128, 128)  # of the latent, the rotary key, a head's key and its value
_LAYER_WIDTHS = (7168, 1536)  # of the residual stream and the queries' latent


class LatentCall(NamedTuple):
    """What is asked of the tables.

    Args:
        kind: a decode step's, or over whole prompts.
        heads: query heads of one GPU.
        kv_format: of the cached latents.
        matrices: format of the projections where they are in the time; None for the kernel alone.
    """

    kind: Kind
    heads: int
    kv_format: str
    matrices: str | None


def has_kernels(tables: StackTables) -> bool:
    """Whether a stack's latent attention was measured without its projections."""
    return _kernel_table(tables, "generation") is not None


def check_latent(tables: StackTables, shape: ModelShape) -> None:
    """Refuse widths that were not measured.

    Raises:
        KvtuneError: the model has other widths.
    """
    latent = shape.latent
    if latent is None:
        return
    widths = latent.kv_lora_rank, latent.rope_dim, latent.nope_dim, latent.value_dim
    layer = shape.hidden_size, latent.query_lora_rank
    alike = widths == _WIDTHS and (has_kernels(tables) or layer == _LAYER_WIDTHS)
    if not alike:
        raise KvtuneError(
            f"{shape.name} has latent attention of widths that {tables.stack}'s tables do not "
            "have: they are of DeepSeek-V3 and Kimi K2",
            hint="without --stack kvtune's own model answers.",
        )


def latent_s(
    tables: StackTables, call: LatentCall, batch: npt.ArrayLike, length: npt.ArrayLike
) -> FloatArray:
    """Seconds of one layer, at so many sequences and tokens of each.

    Raises:
        KvtuneError: the stack was not measured so.
    """
    family = _family(tables, call.kind, call.kv_format, call.matrices)
    if not family:
        raise KvtuneError(
            f"{tables.stack} on {tables.system} has no measured latent attention over "
            f"{call.kv_format}" + (f" with matrices in {call.matrices}" if call.matrices else ""),
            hint="--stack or --kv-cache-dtype chooses another.",
        )
    near = min(family, key=lambda one: abs(np.log(one / call.heads)))
    return np.asarray(family[near].at(batch, length) * (call.heads / near))


@functools.lru_cache(maxsize=64)
def absorbed_curve(tables: StackTables, heads: int) -> Curve:
    """Both products of a layer over tokens, for so many heads of one GPU.

    Raises:
        KvtuneError: the stack was not measured.
    """
    table = tables.read("mla_bmm", "mla_bmm_perf", {"bmm_dtype": "bfloat16"})
    if table is None:
        raise KvtuneError(f"{tables.stack} on {tables.system} has no products of latent attention")
    known = np.unique(table.columns["num_heads"])
    near = int(known[np.argmin(np.abs(np.log(known / heads)))])
    both = [
        _curve(table.where(num_heads=near, op_name=name))
        for name in ("mla_gen_pre", "mla_gen_post")
    ]
    rows = np.unique(np.concatenate([each.log_x for each in both]))
    seconds = sum(each.at(np.exp(rows)) for each in both) * (heads / near)
    return Curve(rows, np.log(seconds))


def _curve(table: Table) -> Curve:
    return Curve.of(table.columns["num_tokens"], table.columns["latency"] * 1e-3)


@functools.lru_cache(maxsize=64)
def _kernel_table(tables: StackTables, kind: Kind) -> Table | None:
    return tables.read("mla", _KERNEL_FILES[kind])


@functools.lru_cache(maxsize=64)
def _family(
    tables: StackTables, kind: Kind, kv_format: str, matrices: str | None
) -> dict[int, GeometryGrid]:
    """Grids by the number of heads."""
    if matrices is None:
        table = _kernel_table(tables, kind)
        rows = table and table.where(kv_cache_dtype=kv_format)
    else:
        wanted = {"gemm_type": matrices, "kv_cache_dtype": kv_format, "mla_dtype": "bfloat16"}
        rows = tables.read("mla", _LAYER_FILES[kind], wanted)
    if rows is None or not len(rows):
        return {}
    place = ("num_heads", "batch_size", "step" if kind == "generation" else "isl")
    fastest = rows.fastest_of(*place)
    one_cache = {**fastest.columns, "num_key_value_heads": np.ones(len(fastest), int)}
    points = attention_points(Table(one_cache, fastest.version), kind)
    grids = fit_grids(list(points.values()), attention_features(kind, 0))
    return {heads: grid for (heads, _), grid in zip(points, grids, strict=True) if grid is not None}
