"""What ``kvtune estimate`` was asked for, read from its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from kvtune.cli.engine_report import Engine
    from kvtune.cli.llama_report import LlamaEngine
    from kvtune.cli.stack_options import CacheDtype
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.profiles.shape import ModelShape
    from kvtune.tuner.estimating import Asked

Figures = tuple[str | None, str | None, str | None]
"""Memory, bandwidth and rate of a card, in place of its profile's."""


class Served(NamedTuple):
    """What is served, as it is written; None where it was not."""

    context: str | None
    generated: str | None
    batch: str | None
    weights: str | None


_USUALLY = Served(None, "256", "1", "auto")
"""Without a context, ``usual_context`` of the model."""


@dataclass(frozen=True)
class Typed:
    """Options as they were typed; see their help."""

    model: str
    gpu: str | None
    figures: Figures
    mem: str | None
    served: Served
    price: str | None
    policy: Path | None
    evicts: bool
    gpus: int
    total_gpus: int | None
    prefix: str
    chunk: str | None
    stack: StackChoice | Literal["llama-cpp"]
    engine_args: str
    engine_version: str | None
    kv_cache_dtype: CacheDtype | None
    expert_parallel: int


def read(typed: Typed) -> tuple[Asked, Engine | LlamaEngine | None]:
    """What is asked for, and of which engine.

    Raises:
        KvtuneError: an option makes no sense, or not beside another.
    """
    from kvtune.cli.engine_asked import follow_engine, with_typed
    from kvtune.cli.engine_report import read_engine
    from kvtune.cli.planned import notes_on_model, planned_options
    from kvtune.cli.stack_options import check_expert_parallel, read_cache_dtype

    kv_format = read_cache_dtype(typed.stack, typed.kv_cache_dtype)
    engine = read_engine(typed.stack, typed.engine_args, typed.engine_version)
    document = _document(typed.policy, typed.stack)
    options, planned = planned_options(document, **typed.served._asdict())
    typed, of_run = _as_searched(typed, document)
    plain = _asked(typed, _USUALLY._replace(**options))
    check_expert_parallel(typed.stack, typed.expert_parallel, plain.shape, _most_sharing(typed))
    kernels, told = _kernels(typed.stack, plain.shape)
    from kvtune.simulator.latency.reading import Reading  # what was typed is read before it

    reading = Reading.of(typed.prefix, typed.chunk)
    engine = with_typed(engine, kv_format, reading.chunk_tokens)
    asked = replace(
        plain,
        document=document,
        evicts=typed.evicts,
        gpus=typed.gpus,
        total_gpus=typed.total_gpus,
        stack=kernels,
        kv_format=kv_format or "bfloat16",
        expert_parallel=typed.expert_parallel,
        told=(*told, *planned, *of_run, *notes_on_model(document, plain.shape)),
        reading=reading,
    )
    told_flags = bool(typed.engine_args or typed.engine_version)
    told_context = typed.served.context is not None
    return (
        follow_engine(engine, asked, told_flags=told_flags, told_context=told_context),
        engine,
    )


def _as_searched(typed: Typed, document: PolicyDocument | None) -> tuple[Typed, tuple[str, ...]]:
    """The card and the memory limit as the policy's search had them, as far as neither was typed.

    A limit is taken with its own card alone.
    """
    from kvtune.cli.planned import searched_on

    if typed.policy is None or document is None or any(typed.figures):
        return typed, ()
    taken, notes = searched_on(typed.policy, document, typed.gpu, typed.mem)
    gpu, mem = taken.get("gpu", typed.gpu), taken.get("mem", typed.mem)
    return replace(typed, gpu=gpu, mem=mem), notes


def _most_sharing(typed: Typed) -> int:
    """The most GPUs that share a layer in any way to use the cards that is tried."""
    return typed.total_gpus if typed.gpus == 1 and typed.total_gpus else typed.gpus


def _asked(typed: Typed, served: Served) -> Asked:
    from kvtune.cli.case_options import read_batch, read_cards, read_several
    from kvtune.common.units import parse_bytes, parse_tokens
    from kvtune.simulator.memory.weights import listed_formats
    from kvtune.tuner.target import read_context, read_model, usual_context

    name, shape = read_model(typed.model)
    limit = None if typed.mem is None else parse_bytes(typed.mem)
    cards = read_cards(typed.gpu, typed.figures, limit, typed.price)
    # Takes a while to import, and a mistake needs none of it.
    from kvtune.tuner.estimating import Asked

    _, generated, batch, weights = (word or "" for word in served)
    generated_tokens = parse_tokens(generated)
    contexts = (
        [usual_context(shape, generated_tokens)]
        if served.context is None
        else read_several(served.context, "--context", lambda word: read_context(word, shape))
    )
    return Asked(
        model=name,
        shape=shape,
        generated_tokens=generated_tokens,
        cards=cards,
        contexts=contexts,
        batches=read_several(batch, "--batch", read_batch),
        weights=listed_formats(weights, shape, cards[0].gpu),
        document=None,
        evicts=False,
    )


def _kernels(
    stack: StackChoice | Literal["llama-cpp"], shape: ModelShape
) -> tuple[StackChoice, tuple[str, ...]]:
    """Whose kernels the times are of: of engines the memory is known without their tables."""
    if stack == "llama-cpp":
        return "kvtune", ("times are kvtune's own: nobody's table has llama.cpp's kernels",)
    if stack == "kvtune":
        return stack, ()
    if stack != "vllm":
        return stack, (f"memory is kvtune's own count: {stack}'s is not modelled",)
    from kvtune.common.errors import KvtuneError
    from kvtune.profiles.elsewhere import require_systems_folder
    from kvtune.simulator.latency.serving_kernels import check_layers

    try:
        require_systems_folder()
    except KvtuneError as missing:
        return "kvtune", (f"times are kvtune's own: {missing.message}; {missing.hint}",)
    try:
        check_layers(shape)
    except KvtuneError as unknown:
        return "kvtune", (f"times are kvtune's own: {unknown.message}",)
    return stack, ()


def _document(path: Path | None, stack: str) -> PolicyDocument | None:
    from kvtune.cli.inputs import read_policy_input

    if path is None:
        return None
    document = read_policy_input(path)
    from kvtune.tuner.estimating import check_runtime_alone  # takes a while to import

    check_runtime_alone(stack)
    return document
