"""What an engine's flags change of what is estimated, and what is said beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtune.common.errors import KvtuneError
from kvtune.profiles.split import check_dealt

if TYPE_CHECKING:
    from kvtune.cli.engine_report import Engine
    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.simulator.latency.stacks import KvFormat
    from kvtune.tuner.estimating import Asked

_EAGER = "times are of CUDA graphs, which --enforce-eager turns off: it is slower"
_ONE = "one --gpu, --weights, --context and --batch, and no --total-gpus"


def follow_engine(
    engine: Engine | LlamaEngine | None, asked: Asked, *, told_flags: bool, told_context: bool
) -> Asked:
    """What is asked for by the engine's flags too, with notes on what they do not reach.

    Args:
        engine: that was asked for.
        asked: by the other options.
        told_flags: whether flags or a version were given.
        told_context: whether ``--context`` was given.

    Raises:
        KvtuneError: flags beside several cases, or a context that ``-c`` has no room for.
    """
    from kvtune.cli.llama_report import LlamaEngine

    if engine is None:
        return asked
    if not asked.is_one:
        return _several(asked, told_flags)
    if not isinstance(engine, LlamaEngine):
        return _by_flags(engine, _noted(asked, engine.notes))
    return _noted(_with_context(engine, asked, told_context), engine.notes + _times(engine, asked))


def with_typed(
    engine: Engine | LlamaEngine | None, kv_format: KvFormat | None, chunk_tokens: int | None
) -> Engine | LlamaEngine | None:
    """vLLM with what ``--kv-cache-dtype`` and ``--chunk`` say beside its own flags.

    Raises:
        KvtuneError: a flag of ``--engine-args`` says another.
    """
    from kvtune.cli.llama_report import LlamaEngine

    if engine is None or isinstance(engine, LlamaEngine):
        return engine
    from kvtune.simulator.latency.stacks import KV_BYTES

    flags, size = engine.flags, kv_format and float(KV_BYTES[kv_format])
    _agree("--kv-cache-dtype", size, None if flags.kv_cache_bytes == 2 else flags.kv_cache_bytes)
    _agree("--chunk", chunk_tokens, flags.max_num_batched_tokens)
    typed = replace(
        flags,
        kv_cache_bytes=size or flags.kv_cache_bytes,
        max_num_batched_tokens=chunk_tokens or flags.max_num_batched_tokens,
    )
    return replace(engine, flags=typed)


def _agree(option: str, typed: float | None, told: float | None) -> None:
    if typed is not None and told is not None and typed != told:
        raise KvtuneError(
            f"{option} and --engine-args say two things of one",
            hint=f"leave {option} out, or the flag.",
        )


def _several(asked: Asked, told_flags: bool) -> Asked:
    if told_flags:
        raise KvtuneError(
            "--engine-args and --engine-version are read for one case, and several are asked for",
            hint=f"ask for {_ONE}.",
        )
    whose = "kvtune's own count" if asked.total_gpus else "by the engine's memory"
    return _noted(asked, (f"what fits is {whose}; for all of that memory ask for {_ONE}",))


def _by_flags(engine: Engine, asked: Asked) -> Asked:
    """Times of the cache, the steps and the experts that vLLM's flags ask for."""
    flags = engine.flags
    narrow = flags.kv_cache_bytes == 1
    chunk = flags.max_num_batched_tokens or asked.reading.chunk_tokens
    groups = asked.gpus if flags.expert_parallel else asked.expert_parallel
    check_dealt(asked.shape, asked.gpus, groups)
    return replace(
        asked,
        kv_format="fp8" if narrow else "bfloat16",
        reading=replace(asked.reading, chunk_tokens=chunk),
        expert_parallel=groups,
        told=(*asked.told, *((_EAGER,) if flags.enforce_eager else ())),
    )


def _noted(asked: Asked, notes: tuple[str, ...]) -> Asked:
    return replace(asked, told=(*asked.told, *notes))


def _with_context(engine: LlamaEngine, asked: Asked, told_context: bool) -> Asked:
    """Prompts as long as ``-c`` has room for in each slot, unless ``--context`` says less."""
    from kvtune.tuner.target import read_context

    size, slots = engine.flags.ctx_size, engine.slots(asked.batches[0])
    if size is None:
        return asked
    room = size // slots - asked.generated_tokens
    if room < 1:
        raise KvtuneError(
            f"-c {size} has no room for a prompt beside {asked.generated_tokens} generated tokens "
            f"in each of {slots} slots",
            hint="give a larger -c, or fewer --generated tokens.",
        )
    if not told_context:
        return replace(asked, contexts=(read_context(str(room), asked.shape),))
    if asked.contexts[0] > room:
        raise KvtuneError(
            f"-c {size} has room for {room} tokens of a prompt beside {asked.generated_tokens} "
            f"generated ones in each of {slots} slots, and {asked.contexts[0]} are asked for",
            hint="give a larger -c, or a shorter --context.",
        )
    return asked


def _times(engine: LlamaEngine, asked: Asked) -> tuple[str, ...]:
    """That times do not know of layers on the host."""
    if engine.is_whole(asked.shape.layers):
        return ()
    return (
        "times are as if all layers were on the GPU, and left out where those do not fit there; "
        "with layers or cache on the host it is slower",
    )
