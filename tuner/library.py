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
from typing import TYPE_CHECKING, Any, Literal

from kvtune.common.progress import Progress
from kvtune.common.units import Amount, parse_bytes, parse_tokens
from kvtune.profiles.gpus import GpuProfile
from kvtune.tuner.search_options import MOST_SEQUENCES, SearchOptions, search_request, within_bounds
from kvtune.tuner.target import (
    read_context,
    read_gpu,
    read_model,
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

_PROBES = {"cpu": 4, "cuda": 16}


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
            ``kvtune-runs/<model>-<gpu>-<mem>`` below the current folder, followed by what else
            was asked for: the length of prompts, a stack, bytes that are moved or read.
        progress: what is told of long work; None for silence.
        options: the rest, as ``SearchOptions`` lists it.

    Raises:
        KvtuneError: something is unknown or out of bounds, nothing fits, or a file cannot be kept.
    """
    from kvtune.tuner.search import run_search

    return run_search(search_request(model, gpu, mem, run_dir=run_dir, **options), progress)


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
    from kvtune.simulator.latency.reading import Reading
    from kvtune.simulator.memory.weights import listed_formats
    from kvtune.tuner.estimating import Asked

    name, shape = read_model(model)
    cards = [_card(one, mem) for one in _several(gpu)]
    asked = Asked(
        model=name,
        shape=shape,
        generated_tokens=parse_tokens(generated),
        cards=cards,
        contexts=[read_context(one, shape) for one in _several(context)],
        batches=[within_bounds("--batch", one, 1, MOST_SEQUENCES) for one in _several(batch)],
        weights=listed_formats(",".join(_several(weights)), shape, cards[0].gpu),
        document=_document(policy),
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


def _document(policy: Path | str | PolicyDocument | None) -> PolicyDocument | None:
    from kvtune.policies.policy_file.document import PolicyDocument, read_policy

    if policy is None or isinstance(policy, PolicyDocument):
        return policy
    return read_policy(policy)


def _card(gpu: str | GpuProfile | None, mem: Amount | None) -> Card:
    from kvtune.tuner.cases import Card

    profile = gpu if isinstance(gpu, GpuProfile) else read_gpu(gpu)
    return Card(profile, profile.visible_bytes if mem is None else parse_bytes(mem), None)
