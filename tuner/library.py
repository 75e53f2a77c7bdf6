"""What kvtune's commands do, as functions with typed results; ``import kvtune`` offers them.

::

    import kvtune

    cases = kvtune.estimate("llama-8b", "4090", "16GB", context="32k")
    found = kvtune.search("smollm2-135m", "4090", "1GiB", run_dir="run")
    print(found.sequences, found.quality.kl, found.policy.name)

Models, cards, sizes and tokens are written as on the command line, or given as numbers and objects.
Mistakes raise ``kvtune.KvtuneError``, whose ``hint`` says what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from kvtune.common.errors import KvtuneError
from kvtune.common.progress import Progress
from kvtune.common.units import Amount, parse_bytes, parse_seconds, parse_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.tuner.limits import Limits
from kvtune.tuner.request import SearchRequest
from kvtune.tuner.target import (
    read_context,
    read_context_range,
    read_gpu,
    read_model,
    read_target,
    read_texts,
    read_weights,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.elsewhere import StackChoice
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.trace import Trace
    from kvtune.tuner.cases import Card, Case
    from kvtune.tuner.result import SearchResult
    from kvtune.tuner.samplers import Sampler

N = TypeVar("N", int, float, "int | None")

MOST_SEQUENCES, MOST_TRIALS, MOST_KL, MOST_JOBS = 10**6, 10**5, 100.0, 1024
_PROBES = {"cpu": 4, "cuda": 16}


class SearchOptions(TypedDict, total=False):
    """How hard to look, and at what; every one may be left out.

    Keys:
        context: prompt tokens of a sequence, 8192; ``"4k-64k"`` lets the search choose.
        generated: tokens that each sequence generates, 256.
        batch: sequences at once; left out, as many as ``max_kl`` allows.
        weights: weight format; ``"auto"`` takes the widest that fits; of several, ``"bf16,int4"``,
            or ``"any"``, the widest with which a plan does what is asked.
        max_kl: loss that is acceptable, nats a token, 0.02.
        trials: of the outer study, 60.
        workload: texts that are searched on: ``"small"`` or ``"mixed"`` (JSON, logs, conversations
            and other languages too) for a CPU, ``"full"`` for a GPU.
        menu: methods that a head may have: ``"three"``, or ``"all"``.
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
        texts: your own .txt or .jsonl files, instead of the built-in ones.
        stand_in: uses the packaged tables even where weights are at hand.
        seed: of everything that is drawn, 0.
        device: where the model runs, ``"cpu"`` or ``"cuda"``; left out, a GPU if there is one.
    """

    context: Amount
    generated: Amount
    batch: int | None
    weights: str
    max_kl: float
    trials: int
    workload: Literal["small", "mixed", "full"]
    menu: Literal["three", "all"]
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
    stand_in: bool
    seed: int
    device: str | None


def search(
    model: str,
    gpu: str | GpuProfile | None = None,
    mem: Amount | None = None,
    *,
    run_dir: Path | str | None = None,
    progress: Progress | None = None,
    **options: Unpack[SearchOptions],
) -> SearchResult:
    """The best plan for a model, a card and a memory limit, as ``kvtune search`` finds it.

    Args:
        model: a known name, a Hugging Face folder or id, or a GGUF file.
        gpu: a known card, a card's YAML file, or a profile; None for this machine's.
        mem: for everything together; None for all that the card shows.
        run_dir: where everything goes and is taken up again; None for
            ``kvtune-runs/<model>-<gpu>-<mem>`` below the current folder, and the length of
            prompts where it is not 8192.
        progress: what is told of long work; None for silence.
        options: the rest, as ``SearchOptions`` lists it.

    Raises:
        KvtuneError: something is unknown or out of bounds, nothing fits, or a file cannot be kept.
    """
    from kvtune.tuner.search import run_search

    return run_search(search_request(model, gpu, mem, run_dir=run_dir, **options), progress)


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
    wanted = str(options.get("context", 8192))
    read, moved = options.get("read_bytes"), options.get("moved_bytes")
    heads = options.get("heads")
    if read is not None and moved is not None:
        raise KvtuneError(
            "--read-bytes and --moved-bytes are limits of two different searches",
            hint="give one of them.",
        )
    if options.get("jobs", 1) > 1 and options.get("storage") is not None:
        raise KvtuneError(
            "--jobs answers trials side by side here, --storage shares them with workers",
            hint="give one of them; kvtune worker can be started as often as there are cores.",
        )
    shortest = wanted.partition("-")[0]
    target = read_target(model, gpu, mem, shortest, options.get("generated", 256))
    context, longest = read_context_range(wanted, target.shape)
    called = "all" if mem is None else str(mem)
    stack = options.get("stack")
    length = "" if (context, longest) == (8192, None) else wanted
    folder = run_dir or default_run_dir(target.shape.name, target.gpu.slug, called, stack, length)
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
        sequences=_within("--batch", options.get("batch"), 1, MOST_SEQUENCES),
        largest_kl=_within("--max-kl", options.get("max_kl", 0.02), 0, MOST_KL),
        trials=_within("--trials", options.get("trials", 60), 1, MOST_TRIALS),
        seed=options.get("seed", 0),
        stand_in=options.get("stand_in", False),
        device=options.get("device"),
        workload=options.get("workload", "small"),
        menu=options.get("menu", "three"),
        stack=known_stack(stack),
        read_bytes=None if read is None else parse_bytes(read),
        limits=_limits(options),
        sampler=options.get("sampler"),
        jobs=_within("--jobs", options.get("jobs", 1), 1, MOST_JOBS),
        storage=options.get("storage"),
        engine=options.get("engine"),
        starts=tuple(map(Path, options.get("start", ()))),
        moved_bytes=None if moved is None else parse_bytes(moved),
        heads=None if heads is None else Path(heads),
        texts=read_texts(options.get("texts", ())),
    )
    from kvtune.tuner.checks import check_request

    check_request(request)
    return request


def _limits(options: SearchOptions) -> Limits:
    tpot, ttft = options.get("tpot"), options.get("ttft")
    return Limits(
        time_per_token_s=None if tpot is None else parse_seconds(tpot),
        first_token_s=None if ttft is None else parse_seconds(ttft),
        sequences=_within("--sequences", options.get("sequences"), 1, MOST_SEQUENCES),
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
    from kvtune.policies.export.contract import find_exporter

    return find_exporter(stack).name if stack else None


def default_run_dir(
    model: str, gpu: str, mem: str, stack: str | None = None, context: str = ""
) -> Path:
    """``kvtune-runs/llama-3.1-8b-rtx-4090-16gb`` below the current folder.

    Prompts of another length than usual, ``context``, and a stack are part of the name.
    """
    asked = [part.replace(" ", "").lower() for part in (mem, context) if part]
    parts = (model, gpu, *asked, *(("for", stack) if stack else ()))
    return Path("kvtune-runs") / "-".join(part.replace("/", "-") for part in parts)


def estimate(
    model: str,
    gpu: str | GpuProfile | Sequence[str | GpuProfile] | None = None,
    mem: Amount | None = None,
    *,
    context: Amount | Sequence[Amount] = 8192,
    generated: Amount = 256,
    batch: int | Sequence[int] = 1,
    weights: str | Sequence[str] = "auto",
    policy: Path | str | PolicyDocument | None = None,
    gpus: int = 1,
    stack: StackChoice = "kvtune",
    prefix: Amount = 0,
    chunk: Amount | None = None,
) -> list[Case]:
    """Memory and time of the full cache, and of a policy beside it; nothing is run.

    Args:
        model: a known name, a Hugging Face folder or id, or a GGUF file.
        gpu: cards by name or profile, one or several; None for this machine's.
        mem: for everything together; None for all that each card shows.
        context: prompt tokens of a sequence, one length or several.
        generated: tokens that each sequence generates.
        batch: sequences at once, one number or several.
        weights: weight formats, one or several; ``"auto"`` takes the widest that fits, ``"any"`` is
            16, 8 and 4 bits.
        policy: a policy file or its document.
        gpus: cards that share each layer.
        stack: whose kernels: kvtune's, or vllm, sglang or trtllm as NVIDIA measured them.
        prefix: first tokens of each prompt whose keys and values are held already.
        chunk: tokens of a prompt that are read at once; None for all.

    Returns:
        Every combination of card, weights, context and batch: the full cache, then the policy.

    Raises:
        KvtuneError: something is unknown or out of bounds.
    """
    from kvtune.policies.policy_file.document import PolicyDocument, read_policy
    from kvtune.simulator.latency.chunks import Reading
    from kvtune.simulator.memory.weights import listed_formats
    from kvtune.tuner.cases import Asked

    name, shape = read_model(model)
    cards = [_card(one, mem) for one in _several(gpu)]
    document = (
        policy if policy is None or isinstance(policy, PolicyDocument) else read_policy(policy)
    )
    asked = Asked(
        model=name,
        shape=shape,
        generated_tokens=parse_tokens(generated),
        cards=cards,
        contexts=[read_context(one, shape) for one in _several(context)],
        batches=[_within("--batch", one, 1, MOST_SEQUENCES) for one in _several(batch)],
        weights=listed_formats(",".join(_several(weights)), shape, cards[0].gpu),
        document=document,
        evicts=False,
        gpus=gpus,
        stack=stack,
        reading=Reading.of(prefix, chunk),
    )
    return list(asked.cases())


def capture(
    model: str,
    out: Path | str,
    *,
    workload: Literal["small", "mixed", "full"] = "small",
    texts: Iterable[Path | str] = (),
    probes: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Record what every head attends to, for the replay of any policy.

    Args:
        model: a Hugging Face folder or id, a GGUF file, or a name whose weights are fetched.
        out: folder of the trace; what an interrupted call finished there is kept.
        workload: ``"small"`` or ``"mixed"`` for a CPU, ``"full"`` for a GPU.
        texts: your own .txt or .jsonl files, instead of the built-in ones.
        probes: Fisher probes a sample; None for 4 on a CPU and 16 on a GPU.
        tokens: of every sample; None for the workload's own. Memory grows with it, not with its
            square; the model must be made for so many.
        seed: of everything that is drawn.
        device: ``"cpu"`` or ``"cuda"``; None for a GPU if there is one.
        progress: what is told of long work; None for silence.

    Raises:
        KvtuneError: the weights are not at hand, or the folder holds another trace.
    """
    name = read_weights(model)[0]
    files = read_texts(texts)
    from kvtune.traces.capture import capture as record
    from kvtune.traces.models import best_device, load_model
    from kvtune.traces.workloads import build, named_workload

    plan = named_workload(workload, seed, files)
    if tokens is not None:
        plan = replace(plan, tokens=tokens)
    loaded = load_model(name, device=device or best_device(), progress=progress)
    return record(
        loaded,
        build(plan, loaded.tokenizer),
        Path(out),
        probes=probes or _PROBES[loaded.device.split(":", 1)[0]],
        seed=seed,
        workload_description=plan.describe(),
        signals=_signals(loaded),
        progress=progress,
    )


def _signals(loaded: LoadedModel) -> tuple[str, ...]:
    """All that any search reads; a calibration only where the model has one."""
    from kvtune.traces.calibration import find_calibration
    from kvtune.tuner.options import WEIGHTED, Menu, every_method
    from kvtune.tuner.sources import signals_of

    calibrated = find_calibration(loaded.fingerprint) is not None
    methods = every_method(calibrated=calibrated, reads_less=True)
    return signals_of(Menu(methods, (), (), WEIGHTED).needs)


def _several(one: Any) -> Sequence[Any]:
    """A list as it is, a single thing as a list of one."""
    return one if isinstance(one, Sequence) and not isinstance(one, str) else [one]


def _within(option: str, number: N, least: float, most: float) -> N:
    """``number``, where it lies within the bounds or is None."""
    if number is not None and not least <= number <= most:
        raise KvtuneError(
            f"{option} {number} is not between {least:,} and {most:,}",
            hint=f"give a number from {least:,} to {most:,}.",
        )
    return number


def _card(gpu: str | GpuProfile | None, mem: Amount | None) -> Card:
    from kvtune.tuner.cases import Card

    profile = gpu if isinstance(gpu, GpuProfile) else read_gpu(gpu)
    return Card(profile, profile.visible_bytes if mem is None else parse_bytes(mem), None)
