"""What a search may be asked, as options of the command line and the library, and its request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

from kvtune.common.errors import KvtuneError
from kvtune.common.units import Amount, parse_bytes, parse_seconds
from kvtune.profiles.gpus import GpuProfile
from kvtune.tuner.limits import Limits
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.target import (
    USUAL_CONTEXT,
    Target,
    read_context_range,
    read_lengths,
    read_target,
    read_texts,
    read_weights,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvtune.profiles.models import ModelShape
    from kvtune.tuner.samplers import Sampler

N = TypeVar("N", int, float, "int | None")

MOST_SEQUENCES, MOST_TRIALS, MOST_KL, MOST_JOBS = 10**6, 10**5, 100.0, 1024


USUAL_KL = 0.02
"""Nats a token that a search accepts unless it is told otherwise."""


class SearchOptions(TypedDict, total=False):
    """How hard to look, and at what; every one may be left out.

    Keys:
        context: prompt tokens of a sequence; left out, 8192 or what a shorter model leaves beside
            the generated ones; ``"4k-64k"`` lets the search choose.
        generated: tokens that each sequence generates, 256.
        batch: sequences at once; left out, as many as ``max_kl`` allows.
        weights: weight format; ``"auto"`` takes the widest that fits; of several, ``"bf16,int4"``,
            or ``"any"``, the widest with which a plan does what is asked.
        max_kl: loss that is acceptable, nats a token, 0.02.
        trials: of the outer study, 60.
        workload: texts that are searched on: ``"small"`` or ``"mixed"`` (JSON, logs, conversations,
            other languages, a guide and sources too) for a CPU, ``"full"`` for a GPU.
        menu: methods that a head may have: ``"three"``, ``"few"`` more, or ``"all"``, of which the
            best seven; left out, ``"auto"``: all on a GPU, on a CPU as many as add little time.
        stack: a serving stack that the plan must be expressible on: ``"vllm"``, ``"llama-cpp"``...
        read_bytes: that a decode step may read of each sequence's prompt; left out, any.
        tpot: most time of a decode step of all sequences: ``"30ms"``; left out, any.
        ttft: most time for reading and compressing one prompt: ``"2s"``; left out, any.
        sequences: that must fit at once, at least; left out, one.
        sampler: ``"tpe"``, ``"nsga2"`` or ``"random"``; left out, by the number of trials.
        jobs: trials that are proposed together and answered at the same time, 1.
        storage: URL of a database through which other workers share the trials.
        engine: makes trace and tables: ``"processes:4"``, or a dask scheduler's address.
        start: policy files of published patterns or former searches to begin with.
        heads: a file of head scores (``kvtune heads``); plans that follow them are run beside
            others, where the model's weights are at hand.
        moved_bytes: that a decode step may bring over from the host of each sequence's prompt; with
            it heads may lie there.
        lengths: prompt tokens that the chosen plan is also run at: ``"2k,4k"``; left out, the
            context on a GPU, none on a CPU.
        texts: your own .txt or .jsonl files, instead of the built-in ones.
        stand_in: uses the packaged tables even where weights are at hand.
        seed: of everything that is drawn, 0.
        device: where the model runs, ``"cpu"`` or ``"cuda"``; left out, a GPU if there is one.
    """

    context: Amount | None
    generated: Amount
    batch: int | None
    weights: str
    max_kl: float
    trials: int
    workload: Literal["small", "mixed", "full"]
    menu: Literal["auto", "three", "few", "all"]
    stack: str | None
    read_bytes: Amount | None
    tpot: str | None
    ttft: str | None
    sequences: int | None
    sampler: Sampler | None
    jobs: int
    storage: str | None
    engine: str | None
    start: Iterable[Path | str]
    moved_bytes: Amount | None
    heads: Path | str | None
    texts: Iterable[Path | str]
    lengths: str | None
    stand_in: bool
    seed: int
    device: str | None


def search_request(
    model: str,
    gpu: str | GpuProfile | None = None,
    mem: Amount | None = None,
    *,
    run_dir: Path | str | None = None,
    **options: Unpack[SearchOptions],
) -> SearchRequest:
    """What ``search`` is asked, checked; nothing is run or written.

    Raises:
        KvtuneError: something is unknown or out of bounds.
    """
    _check_together(options)
    stack = known_stack(options.get("stack"))
    read, moved = options.get("read_bytes"), options.get("moved_bytes")
    heads = options.get("heads")
    wanted = options.get("context")
    shortest = None if wanted is None else str(wanted).partition("-")[0]
    target = read_target(model, gpu, mem, shortest, options.get("generated", 256))
    context, longest = (
        (target.context_tokens, None)
        if wanted is None
        else read_context_range(str(wanted), target.shape)
    )
    length = None if longest is None and context == USUAL_CONTEXT else wanted
    asked = {"": length, "for": stack, "moved": moved, "read": read, **_else_asked(options)}
    folder = run_dir or default_run_dir(target, "all" if mem is None else mem, asked)
    request = SearchRequest(
        model=target.model,
        shape=target.shape,
        gpu=target.gpu,
        memory_bytes=target.memory_bytes,
        run_dir=Path(folder),
        weights=options.get("weights", "auto"),
        context_tokens=context,
        longest_context=longest,
        generated_tokens=target.generated_tokens,
        sequences=within_bounds("--batch", options.get("batch"), 1, MOST_SEQUENCES),
        largest_kl=within_bounds("--max-kl", options.get("max_kl", USUAL_KL), 0, MOST_KL),
        trials=within_bounds("--trials", options.get("trials", 60), 1, MOST_TRIALS),
        seed=options.get("seed", 0),
        stand_in=options.get("stand_in", False),
        device=options.get("device"),
        workload=options.get("workload", "small"),
        menu=options.get("menu", "auto"),
        stack=stack,
        read_bytes=None if read is None else parse_bytes(read),
        limits=_limits(options),
        sampler=options.get("sampler"),
        jobs=within_bounds("--jobs", options.get("jobs", 1), 1, MOST_JOBS),
        storage=options.get("storage"),
        engine=options.get("engine"),
        starts=tuple(map(Path, options.get("start", ()))),
        moved_bytes=None if moved is None else parse_bytes(moved),
        heads=None if heads is None else Path(heads),
        texts=read_texts(options.get("texts", ())),
        lengths=_lengths(options, target.shape),
    )
    from kvtune.tuner.checks import check_request

    check_request(request)
    return request


def _lengths(options: SearchOptions, shape: ModelShape) -> tuple[int, ...] | None:
    """Prompt lengths to run the plan at, no longer than the workload's samples can be."""
    if options.get("lengths") is None:
        return None
    from kvtune.traces.workloads import named_workload

    observed = named_workload(options.get("workload", "small"), 0).observed
    return read_lengths(options["lengths"], shape, observed)


def _check_together(options: SearchOptions) -> None:
    """Refuse options of which a search can have one alone."""
    if options.get("read_bytes") is not None and options.get("moved_bytes") is not None:
        raise KvtuneError(
            "--read-bytes and --moved-bytes are limits of two different searches",
            hint="give one of them.",
        )
    if options.get("jobs", 1) > 1 and options.get("storage") is not None:
        raise KvtuneError(
            "--jobs answers trials side by side here, --storage shares them with workers",
            hint="give one of them; kvtune worker can be started as often as there are cores.",
        )


def _limits(options: SearchOptions) -> Limits:
    tpot, ttft = options.get("tpot"), options.get("ttft")
    return Limits(
        time_per_token_s=None if tpot is None else parse_seconds(tpot),
        first_token_s=None if ttft is None else parse_seconds(ttft),
        sequences=within_bounds("--sequences", options.get("sequences"), 1, MOST_SEQUENCES),
    )


def weights_request(
    model: str, run_dir: Path | str, **options: Unpack[SearchOptions]
) -> SearchRequest:
    """A search's request where only the model, its samples and its menu matter: no card is served.

    Raises:
        KvtuneError: the weights are not at hand, or something is unknown or out of bounds.
    """
    from kvtune.profiles.gpus import list_gpus

    name = read_weights(model)[0]
    options["context"] = 1024
    return search_request(name, list_gpus()[0], run_dir=run_dir, **options)


def known_stack(stack: str | None) -> str | None:
    """A stack's name, if an exporter has it.

    Raises:
        KvtuneError: none has.
    """
    if not stack:
        return None
    from kvtune.policies.export.contract import find_exporter

    return find_exporter(stack).name


def _else_asked(options: SearchOptions) -> dict[str, Amount | None]:
    """What of the other options is not as usual, by the word that names it in a folder."""
    weights, loss = str(options.get("weights", "auto")), options.get("max_kl", USUAL_KL)
    return {
        "batch": options.get("batch"),
        "weights": None if weights == "auto" else weights.replace(",", "-"),
        "tpot": options.get("tpot"),
        "ttft": options.get("ttft"),
        "kl": None if loss == USUAL_KL else f"{loss:g}",
    }


def default_run_dir(target: Target, mem: Amount, asked: Mapping[str, Amount | None]) -> Path:
    """``kvtune-runs/llama-3.1-8b-rtx-4090-16gb`` below the current folder.

    Args:
        target: whose model and card are named first.
        mem: the memory limit, as it was written.
        asked: what makes it another search than the usual one of this limit, each with a word
            before it: ``{"moved": "1.5GB"}``; None where it was not asked for.
    """
    words = [target.shape.name, target.gpu.slug, _in_a_name(mem)]
    for word, value in asked.items():
        words += [word, _in_a_name(value)] if value is not None else []
    return Path("kvtune-runs") / "-".join(word.replace("/", "-") for word in words if word)


def _in_a_name(value: Amount) -> str:
    return str(value).replace(" ", "").lower()


def within_bounds(option: str, number: N, least: float, most: float) -> N:
    """``number``, where it lies within the bounds or is None."""
    if number is not None and not least <= number <= most:
        raise KvtuneError(
            f"{option} {number} is not between {least:,} and {most:,}",
            hint=f"give a number from {least:,} to {most:,}.",
        )
    return number
