"""What an engine would print of its KV cache: read from the options, as a table and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvtune.common.errors import KvtuneError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.simulator.memory.engine_memory import EngineFlags, EngineMemory
    from kvtune.simulator.memory.llama_memory import LlamaMemory
    from kvtune.tuner.cases import Case
    from kvtune.tuner.estimating import Asked


@dataclass(frozen=True)
class Engine:
    """vLLM, as it was asked for.

    Args:
        flags: of ``vllm serve``.
        version: of vLLM.
        notes: on flags that were not read.
    """

    flags: EngineFlags
    version: str
    notes: tuple[str, ...]


def read_engine(stack: str, engine_args: str, version: str | None) -> Engine | LlamaEngine | None:
    """The engine of ``--stack vllm`` or ``llama-cpp``; None for other stacks.

    Raises:
        KvtuneError: flags or a version without such a stack, or that make no sense.
    """
    if stack == "llama-cpp":
        from kvtune.cli.llama_report import read_llama

        return read_llama(engine_args, version)
    if stack != "vllm":
        if engine_args or version:
            raise KvtuneError(
                "--engine-args and --engine-version are those of vLLM and llama.cpp",
                hint="add --stack vllm or --stack llama-cpp.",
            )
        return None
    from kvtune.cli.engine_args import read_engine_args
    from kvtune.simulator.memory.engine_releases import NEWEST, find_release

    flags, notes = read_engine_args(engine_args)
    find_release(version or NEWEST)
    return Engine(flags, version or NEWEST, notes)


def engine_of(
    engine: Engine | LlamaEngine | None, asked: Asked, case: Case
) -> EngineMemory | LlamaMemory | str | None:
    """The engine's memory for a case, or a sentence why it is not known."""
    if engine is None:
        return None
    try:
        if isinstance(engine, Engine):
            return _vllm(engine, asked, case)
        return engine.memory(asked, case)
    except KvtuneError as error:
        return f"engine: {error.message}"


def _vllm(engine: Engine, asked: Asked, case: Case) -> EngineMemory:
    from kvtune.simulator.memory.engine_memory import engine_memory

    flags, card = engine.flags, case.card
    if flags.gpu_memory_utilization is None and card.memory_bytes < card.gpu.visible_bytes:
        share = card.memory_bytes / card.gpu.visible_bytes
        flags = replace(flags, gpu_memory_utilization=share)
    weights = case.weight_format(asked.shape)
    return engine_memory(asked.shape, card.gpu, weights, flags, engine.version, asked.gpus)


def engine_table(memory: EngineMemory | LlamaMemory) -> RenderableType:
    """Where an engine's share of a card goes, as its log has it."""
    from kvtune.cli.llama_report import llama_table
    from kvtune.simulator.memory.llama_memory import LlamaMemory

    return llama_table(memory) if isinstance(memory, LlamaMemory) else _vllm_table(memory)


def _vllm_table(memory: EngineMemory) -> RenderableType:
    from kvtune.cli.output import table
    from kvtune.common.estimate import exact
    from kvtune.common.units import GIB, format_tokens

    share = memory.limit_bytes / memory.device_bytes
    parts = (
        ("limit", exact(memory.limit_bytes, "B"), f"{share:.3g} of all that the card shows"),
        ("- weights", memory.weights, ""),
        ("- profile run", memory.activation, "peak of the longest step and the sampler"),
        ("- process", memory.process, "outside torch"),
        ("- CUDA graphs", memory.graphs, "reserved before the cache"),
        ("= KV cache", memory.cache, "as in: Available KV cache memory"),
    )
    ends = [format_tokens(end).removesuffix(" tokens") for end in _ends(memory)]
    rows = [
        (name, f"{part.value / GIB:.2f}", _interval(part, GIB), part.tier, words)
        for name, part, words in parts
    ]
    printed = f"GPU KV cache size: {int(memory.tokens.value):,} tokens"
    return table(
        f"Memory of vLLM {memory.release} on one GPU",
        ("", "GiB", "interval", "tier", ""),
        rows,
        left=(0, 2, 3, 4),
        caption=f"{printed} [{ends[0]}, {ends[1]}], blocks of {memory.block_size}",
    )


def _ends(memory: EngineMemory) -> tuple[float, float]:
    return memory.tokens.low, memory.tokens.high


def _interval(part: Any, unit: int) -> str:
    if part.low == part.high:
        return ""
    return f"[{part.low / unit:.2f}, {part.high / unit:.2f}]"


def as_json(memory: EngineMemory | LlamaMemory | str | None) -> dict[str, Any] | None:
    """The form that goes into JSON; None where nothing is known."""
    from kvtune.cli.llama_report import llama_json
    from kvtune.simulator.memory.llama_memory import LlamaMemory

    if memory is None or isinstance(memory, str):
        return None
    if isinstance(memory, LlamaMemory):
        return llama_json(memory)
    plain = {key: value for key, value in asdict(memory).items() if not isinstance(value, dict)}
    estimates = ("weights", "activation", "process", "graphs", "cache", "tokens")
    return plain | {key: getattr(memory, key).as_dict() for key in estimates}
