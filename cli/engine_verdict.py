"""Whether what is served fits by an engine's own memory, and what would where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvtune.cli.engine_report import Engine, engine_of
from kvtune.common.errors import KvtuneError
from kvtune.common.estimate import Estimate
from kvtune.common.units import format_bytes
from kvtune.common.words import count
from kvtune.profiles.split import split_over
from kvtune.simulator.memory.llama_memory import LlamaMemory

if TYPE_CHECKING:
    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.simulator.memory.engine_memory import EngineMemory
    from kvtune.tuner.cases import Case
    from kvtune.tuner.estimating import Asked

    Memory = EngineMemory | LlamaMemory


@dataclass(frozen=True)
class Verdict:
    """What an engine's memory says of a case.

    Args:
        fits: whether all sequences fit at once.
        text: the headline.
        would_fit: options with which it would, where it does not.
    """

    fits: bool
    text: str
    would_fit: tuple[str, ...] = ()


def verdict_of(
    engine: Engine | LlamaEngine | None, memory: Memory | str | None, asked: Asked, case: Case
) -> Verdict | None:
    """The engine's verdict; None where its memory is not known.

    Raises:
        KvtuneError: a sequence is longer than the maximum length that the engine was given.
    """
    if engine is None or memory is None or isinstance(memory, str):
        return None
    fits, text = _judged(engine, memory, asked, case)
    if fits:
        return Verdict(True, f"fits: {text}")
    would = (*_fewer_at_once(memory, asked, case), *_what_would_fit(engine, asked, case))
    mend = f"what would fit: {', or '.join(would)}" if would else "no known card is enough"
    return Verdict(False, f"does not fit: {text}; {mend}", would)


def judged_each(
    engine: Engine | LlamaEngine | None, asked: Asked, cases: Iterable[Case]
) -> list[Case]:
    """Cases with what an engine without flags says of each, where its memory is known."""
    if engine is None or asked.total_gpus:
        return list(cases)
    return [_judged_one(engine, asked, case) for case in cases]


def _judged_one(engine: Engine | LlamaEngine, asked: Asked, case: Case) -> Case:
    memory = engine_of(engine, asked, case)
    if memory is None or isinstance(memory, str):
        return case
    return by_engine(engine, memory, asked, case, _judged(engine, memory, asked, case)[0])


def by_engine(
    engine: Engine | LlamaEngine | None, memory: Memory | str | None, asked: Asked, case: Case,
    fits: bool,
) -> Case:  # fmt: skip
    """A case whose memory is what the engine takes, and whose sequences are those that it holds."""
    if case.cost is None or memory is None or isinstance(memory, str):
        return replace(case, engine_fits=fits)
    if isinstance(memory, LlamaMemory):
        assert not isinstance(engine, Engine)  # noqa: S101 - whose memory it is
        cached = memory.cache.value + memory.host_cache.value
        prompt = int(cached * case.context_tokens / memory.ctx_size)
        most = _slots_with_room(memory, engine.slots(case.batch) if engine else 1)
        peak = memory.total
    else:
        prompt, reserved = case.cost.prompt_bytes, memory.limit_bytes
        peak = Estimate(reserved, reserved, reserved, "B", "assumed")  # vLLM takes it all, or fails
        most = _at_once(memory, asked, case)
    whole = split_over(asked.shape, asked.gpus).kv_bytes(case.context_tokens)
    cost = replace(
        case.cost, prompt_bytes=prompt, share=prompt / whole, memory=peak,
        sequences_that_fit=int(most.value), most_at_once=most,
    )  # fmt: skip
    return replace(case, engine_fits=fits, cost=cost)


def _at_once(memory: EngineMemory, asked: Asked, case: Case) -> Estimate:
    """Sequences that vLLM's cache holds and that it runs at once."""
    each, held = case.context_tokens + asked.generated_tokens, memory.tokens
    value, low, high = (
        min(int(end) // each, memory.sequences) for end in (held.value, held.low, held.high)
    )
    return Estimate(value, low, high, "sequences", held.tier)


def _slots_with_room(memory: LlamaMemory, slots: int) -> Estimate:
    """How many slots the GPU has room for; all of a cache that is on the host."""
    total, cache = memory.total, memory.cache
    if not cache.value:
        return Estimate(slots, slots, slots, "sequences", total.tier)
    value, low, high = (
        max(int((memory.limit_bytes - taken + of_it) / (of_it / slots)), 0)
        for taken, of_it in (
            (total.value, cache.value), (total.high, cache.high), (total.low, cache.low),
        )
    )  # fmt: skip
    return Estimate(value, low, high, "sequences", total.tier)


def _judged(
    engine: Engine | LlamaEngine, memory: Memory, asked: Asked, case: Case
) -> tuple[bool, str]:
    if isinstance(memory, LlamaMemory):
        return _judged_llama(memory, case.weight_format(asked.shape))
    assert isinstance(engine, Engine)  # noqa: S101 - whose memory it is
    return _judged_vllm(engine, memory, asked, case)


def _judged_llama(memory: LlamaMemory, weights: str) -> tuple[bool, str]:
    host = memory.host_weights.value + memory.host_cache.value + memory.host_compute.value
    return memory.total.value <= memory.limit_bytes, (
        f"llama.cpp at a context of {count(memory.ctx_size)} tokens takes "
        f"with {weights} weights {format_bytes(memory.total.value)} of the GPU's "
        f"{format_bytes(memory.limit_bytes)}, and {format_bytes(host)} of the host"
    )


def _judged_vllm(
    engine: Engine, memory: EngineMemory, asked: Asked, case: Case
) -> tuple[bool, str]:
    """vLLM starts only where its cache holds one request as long as ``--max-model-len``."""
    sequence, held = case.context_tokens + asked.generated_tokens, int(memory.tokens.value)
    longest = engine.flags.max_model_len
    if longest is not None and sequence > longest:
        raise KvtuneError(
            f"{count(case.context_tokens)} tokens and {count(asked.generated_tokens)} generated "
            f"are beyond --max-model-len {longest}",
            hint="give a shorter --context, or a longer --max-model-len.",
        )
    said = f"vLLM's cache holds {count(held)} tokens"
    if longest is not None and held < longest:
        return False, f"{said}, less than one request of --max-model-len {longest}"
    at_once = f"{count(held // sequence)} x {count(sequence)}"
    said += f", so {at_once} at once; asked for: {count(case.batch)}"
    if case.batch > memory.sequences:
        return False, f"{said}, of which --max-num-seqs runs {memory.sequences}"
    start = f"; it starts with --max-model-len {held} or less"
    told = start if longest is None and sequence <= held < asked.shape.max_context else ""
    return held >= case.batch * sequence, said + told


def _fewer_at_once(memory: Memory, asked: Asked, case: Case) -> tuple[str, ...]:
    """The sequences that vLLM's cache holds; llama.cpp's table says the longest context."""
    if isinstance(memory, LlamaMemory):
        return ()
    most = int(_at_once(memory, asked, case).value)
    return (f"--batch {most}",) if 0 < most < case.batch else ()


def _what_would_fit(engine: Engine | LlamaEngine, asked: Asked, case: Case) -> Iterator[str]:
    """Fewer layers on the GPU, narrower weights, or the smallest known card."""
    if not isinstance(engine, Engine):
        yield from _fewer_layers(engine, asked, case)
    from kvtune.profiles.gpus import list_gpus
    from kvtune.simulator.memory.weights import formats_by_width, weight_bytes
    from kvtune.tuner.cases import Card

    now = weight_bytes(asked.shape, case.weight_format(asked.shape)).value
    for weights in formats_by_width(asked.shape, case.card.gpu):
        if weight_bytes(asked.shape, weights).value < now and _fits(
            engine, asked, replace(case, budget=None, weights=weights)
        ):
            yield f"--weights {weights}"
            break
    larger = [gpu for gpu in list_gpus() if gpu.visible_bytes > case.card.memory_bytes]
    for gpu in sorted(larger, key=lambda gpu: gpu.visible_bytes):
        if _fits(engine, asked, replace(case, card=Card(gpu, gpu.visible_bytes, None))):
            yield f"--gpu {gpu.slug}"
            break


def _fewer_layers(engine: LlamaEngine, asked: Asked, case: Case) -> Iterator[str]:
    """The most layers that fit on the GPU, where fewer than now do."""
    most = asked.shape.layers if engine.flags.gpu_layers is None else engine.flags.gpu_layers - 1
    for layers in range(min(most, asked.shape.layers), -1, -1):
        fewer = replace(engine, flags=replace(engine.flags, gpu_layers=layers))
        if _fits(fewer, asked, case):
            yield f"-ngl {layers} in --engine-args"
            return


def _fits(engine: Engine | LlamaEngine, asked: Asked, case: Case) -> bool:
    memory = engine_of(engine, asked, case)
    if memory is None or isinstance(memory, str):
        return False
    return _judged(engine, memory, asked, case)[0]
