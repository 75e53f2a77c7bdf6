"""What is served, on which card and in how much memory: names and sizes as people write them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvtune.common.errors import KvtuneError
from kvtune.common.units import Amount, format_tokens, parse_bytes, parse_tokens
from kvtune.common.words import count
from kvtune.profiles.gpus import GpuProfile, detect_gpu, find_gpu
from kvtune.profiles.models import ModelShape, find_model, shape_from_config

USUAL_CONTEXT = 8192


@dataclass(frozen=True)
class Target:
    """What is to be served, on what, in how much memory.

    Args:
        model: as the loader takes it: a known name, a path or a Hub id.
        shape: its shape.
        gpu: the card.
        memory_bytes: that everything together may take.
        context_tokens: prompt tokens of a sequence.
        generated_tokens: tokens that each sequence generates.
    """

    model: str
    shape: ModelShape
    gpu: GpuProfile
    memory_bytes: int
    context_tokens: int
    generated_tokens: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of the request: that it exceeds the model's length."""
        told = beyond_length(self.shape, self.context_tokens, self.generated_tokens)
        return (told,) if told else ()


def read_target(
    model: str,
    gpu: str | GpuProfile | None,
    mem: Amount | None,
    context: Amount | None,
    generated: Amount,
) -> Target:
    """The options that say what is served; without a context, ``usual_context`` of the model.

    Raises:
        KvtuneError: one of them is unknown, has no unit, or is more than the model takes.
    """
    name, shape = read_model(model)
    card = gpu if isinstance(gpu, GpuProfile) else read_gpu(gpu)
    memory = card.visible_bytes if mem is None else parse_bytes(mem)
    written = parse_tokens(generated)
    read = usual_context(shape, written) if context is None else read_context(context, shape)
    return Target(name, shape, card, memory, read, written)


def read_model(name: str) -> tuple[str, ModelShape]:
    """What the loader is to be given, and the shape.

    Raises:
        KvtuneError: neither a known name nor a path or Hub id with a configuration.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        from kvtune.profiles.gguf_shape import shape_from_gguf

        return str(path), shape_from_gguf(path)
    if path.exists():
        return str(path), shape_from_config(path)
    if _looks_like_path(name):
        hint = "give a folder with a config.json, a .gguf file, or a name of kvtune models."
        raise KvtuneError("there is no such model", where=name, hint=hint)
    try:
        shape = find_model(name)
    except KvtuneError as unknown:
        if name.count("/") != 1:
            raise
        return name, _hub_shape(name, unknown)
    return (name if "/" in name else shape.name), shape


def read_weights(name: str) -> tuple[str, ModelShape]:
    """``read_model`` for what really runs the model.

    Raises:
        KvtuneError: as there, or it is a known shape whose weights must be given.
    """
    from kvtune.traces.models import KNOWN

    loadable, shape = read_model(name)
    if loadable == shape.name and loadable not in KNOWN:
        raise KvtuneError(
            f"the weights of {shape.name} are not at hand, and this runs the model",
            hint="name a folder or a GGUF file with its weights: --model PATH. "
            f"{', '.join(KNOWN)} needs none: kvtune fetches it.",
        )
    return loadable, shape


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _hub_shape(name: str, unknown: KvtuneError) -> ModelShape:
    """The shape of a model on the Hub, of which only the configuration is fetched."""
    import logging

    from huggingface_hub import hf_hub_download

    from kvtune.traces.hub import parts_of

    repository, revision = parts_of(name)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        file = hf_hub_download(repository, "config.json", revision=revision, etag_timeout=5)
    except (OSError, ValueError) as error:
        message = f"{unknown.message} Nor could its configuration be fetched from the Hub"
        raise KvtuneError(message, hint=unknown.hint) from error
    return shape_from_config(file)


def read_gpu(name: str | None) -> GpuProfile:
    """The named card, else this machine's.

    Raises:
        KvtuneError: unknown, or none named and none found.
    """
    found = detect_gpu() if name is None else find_gpu(name)
    if found is None:
        raise KvtuneError(
            "this machine has no GPU that its driver reports, and none was named",
            hint="name one: --gpu 4090; kvtune gpus lists them.",
        )
    return found


def read_context(amount: Amount, shape: ModelShape) -> int:
    """Prompt tokens, no more than the model takes."""
    tokens = parse_tokens(amount)
    if tokens > shape.max_context:
        raise KvtuneError(
            f"{shape.name} takes {format_tokens(shape.max_context)}, not {format_tokens(tokens)}",
            hint=f"--context {shape.max_context} is the most.",
        )
    return tokens


def longest_prompt(shape: ModelShape, observed_tokens: int) -> int:
    """Prompt tokens that the model takes with so many observed ones behind them."""
    return shape.max_context - observed_tokens


def read_lengths(
    listed: str | None, shape: ModelShape, observed_tokens: int
) -> tuple[int, ...] | None:
    """Prompt lengths from ``2k,8k``, each once; None of none.

    Args:
        listed: as typed.
        shape: of the model that runs.
        observed_tokens: of a sample, behind its prompt.

    Raises:
        KvtuneError: one is no number of tokens, none at all, or too long for the model.
    """
    if listed is None:
        return None
    lengths = tuple(dict.fromkeys(parse_tokens(each.strip()) for each in listed.split(",")))
    most = longest_prompt(shape, observed_tokens)
    for tokens in lengths:
        if tokens > most:
            raise KvtuneError(
                f"--lengths {format_tokens(tokens)}: {shape.name} takes "
                f"{format_tokens(shape.max_context)}, of which {observed_tokens} are observed "
                "behind each prompt",
                hint=f"--lengths {most} is the most.",
            )
    return lengths


def usual_context(shape: ModelShape, generated_tokens: int) -> int:
    """Prompt tokens where none are asked for: 8192, or what a shorter model leaves for a prompt."""
    left = shape.max_context - generated_tokens
    return min(USUAL_CONTEXT, left if left > 0 else shape.max_context)


def beyond_length(shape: ModelShape, context_tokens: int, generated_tokens: int) -> str | None:
    """A sentence where prompt and generated tokens together exceed what the model takes."""
    asked = context_tokens + generated_tokens
    if asked <= shape.max_context:
        return None
    left = shape.max_context - generated_tokens
    mend = f"--context {left} leaves room for them" if left > 0 else "--generated must be less"
    return (
        f"length: {format_tokens(context_tokens)} of prompt and {count(generated_tokens)} "
        f"generated are more than the {format_tokens(shape.max_context)} that {shape.name} takes; "
        f"{mend}."
    )


def read_context_range(text: str, shape: ModelShape) -> tuple[int, int | None]:
    """``8192`` as (8192, None), ``4k-64k`` as its two ends, shortest first."""
    shortest, dash, longest = text.partition("-")
    ends = (read_context(shortest, shape), read_context(longest, shape) if dash else None)
    if ends[1] is not None and ends[1] < ends[0]:
        raise KvtuneError(
            f"--context {text} ends below its start",
            hint=f"write --context {longest}-{shortest}.",
        )
    return ends


def read_texts(texts: Iterable[Path | str]) -> tuple[Path, ...]:
    """The user's own text files.

    Raises:
        KvtuneError: one is not there, or is of another kind than .txt and .jsonl.
    """
    paths = tuple(map(Path, texts))
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise KvtuneError("is neither .txt nor .jsonl", where=str(path))
        if not path.is_file():
            raise KvtuneError("there is no such file", where=str(path))
    return paths
