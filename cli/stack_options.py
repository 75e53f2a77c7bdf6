"""Options of a serving stack that several commands share, and what of them excludes what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from kvtune.profiles.shape import ModelShape
    from kvtune.simulator.latency.stacks import KvFormat

CacheDtype = Literal["bf16", "fp8"]
CacheDtypeOption = Annotated[
    CacheDtype | None,
    typer.Option(
        "--kv-cache-dtype",
        help="Format of the cache that --stack serves with; left out: bf16.",
    ),
]
ExpertParallelOption = Annotated[
    int,
    typer.Option(
        "--expert-parallel",
        "--ep",
        metavar="N",
        min=1,
        help="Groups of GPUs that have routed experts of their own under --stack; 1: each GPU has "
        "a share of every expert.",
    ),
]
_TABLES: dict[CacheDtype, KvFormat] = {"bf16": "bfloat16", "fp8": "fp8"}


def read_cache_dtype(stack: str, name: CacheDtype | None) -> KvFormat | None:
    """The tables' name of the format of a stack's cache; None where none was asked for.

    Raises:
        KvtuneError: kvtune's own cache, or llama.cpp's, which other options are for.
    """
    if name is None:
        return None
    hints = {
        "kvtune": "--policy says how kvtune's own runtime stores it: "
        "--policy FILE; or add --stack vllm, sglang or trtllm.",
        "llama-cpp": "--engine-args '-ctk q8_0 -ctv q8_0' chooses llama.cpp's.",
    }
    if stack in hints:
        raise KvtuneError("--kv-cache-dtype is of a serving stack's cache", hint=hints[stack])
    return _TABLES[name]


def check_expert_parallel(stack: str, groups: int, shape: ModelShape, gpus: int) -> None:
    """Refuse groups of experts where no stack's tables answer, or that nothing can be dealt to.

    Raises:
        KvtuneError: kvtune's own model, or llama.cpp; no routed experts, or they or the GPUs do
            not divide into so many groups.
    """
    from kvtune.profiles.split import check_dealt

    if groups > 1 and stack in ("kvtune", "llama-cpp"):
        raise KvtuneError(
            "--expert-parallel is of a serving stack, whose tables have experts dealt to GPUs",
            hint="add --stack vllm, sglang or trtllm, or leave it out.",
        )
    check_dealt(shape, gpus, groups)
