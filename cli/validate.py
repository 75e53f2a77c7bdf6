"""``kvtune validate``: the model really runs with a policy; predicted beside measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvtune.cli import options
from kvtune.cli.output import speaking
from kvtune.cli.timed import times_table
from kvtune.cli.validate_report import answer, known_before, other_texts, report

if TYPE_CHECKING:
    from kvtune.common.progress import Progress
    from kvtune.policies.policy import Policy
    from kvtune.policies.policy_file.document import PolicyDocument
    from kvtune.profiles.shape import ModelShape
    from kvtune.traces.models import LoadedModel
    from kvtune.traces.samples import Sample
    from kvtune.tuner.timing import Served, Times
    from kvtune.tuner.validate import Validation

OWN_RUNTIME = "kvtune"  # for --for: as no stack does


def command(
    policy: options.PolicyFile,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="Left out: the file's own.")
    ] = None,
    workload: options.HeldOut = "small",
    text: options.Texts = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    stack: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="STACK",
            help="Run it as this stack does (llama-cpp, openvino, vllm), which also stores "
            "answers, or as kvtune's own runtime (kvtune); left out: as the file's loss was "
            "measured.",
        ),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Also look for the largest batch that fits; refuse to run without a GPU."
        ),
    ] = False,
    mem: Annotated[
        str | None,
        typer.Option(
            "--mem",
            metavar="SIZE",
            help="On a GPU, run all that the file was planned for within this limit.",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the model with a policy: predicted beside measured."""
    from kvtune.cli.inputs import read_policy_input, read_policy_path
    from kvtune.cli.planned import notes_on_model
    from kvtune.common.units import parse_bytes
    from kvtune.tuner.rounding import rounding_words
    from kvtune.tuner.target import read_texts

    path, texts = read_policy_path(policy), read_texts(text or ())
    document = read_policy_input(policy)
    stack = _stack(document, stack)
    known = known_before(document, path, stack)
    name, shape = _model(document, model)
    bound = document.bind(shape.layers, shape.kv_heads)
    limit = parse_bytes(mem) if mem else None
    with speaking(as_json, quiet) as output:
        told_of_model = notes_on_model(document, shape)
        for note in told_of_model:
            output.progress.note(f"note: {note}")
        from kvtune.traces.models import best_device, load_model

        place = device or best_device()
        if gpu:
            _require_gpu(place)
        loaded = load_model(name, device=place, progress=output.progress)
        samples = _samples(loaded, workload, seed, texts)
        found = _run(bound, loaded, samples, stack, output.progress)
        planned = bound.footprint(samples[0].prompt, loaded.geometry.head_dim)
        output.show(report(known, bound, found, planned, stack))
        told = other_texts(path.parent / "result.json", found)
        rounding = rounding_words(found.rounding, loaded.dtype, {bound.name: found.live.value})
        output.show(*(f"note: {each}" for each in (*told_of_model, told, rounding) if each))
        times, untimed = _times(document, bound, loaded, shape, samples, largest=gpu, limit=limit)
        output.show("", times_table(times) if times else f"times: {untimed}")
        plain = answer(document, known, found, planned, stack) | {"device": loaded.device}
        plain |= {"other_texts": told, "times": times, "untimed": untimed}
        output.finish("validate", plain)


def _stack(document: PolicyDocument, asked: str | None) -> str:
    """The stack to run it as: the one asked for, else the file's; "" for kvtune's own runtime.

    Raises:
        KvtuneError: there is no such stack, or it stores answers in 16 bits.
    """
    from kvtune.common.errors import KvtuneError
    from kvtune.policies.export.contract import exporters
    from kvtune.tuner.within import stores_alike

    if asked == OWN_RUNTIME:
        return ""
    quality = document.provenance.quality if document.provenance else None
    stack = asked or (quality.stack if quality else "")
    if stack and not stores_alike(stack):
        known = ", ".join(name for name in exporters() if stores_alike(name))
        raise KvtuneError(
            f"how {stack} stores answers is not known, or it stores them in 16 bits",
            hint=f"--for takes {known}, or {OWN_RUNTIME} for kvtune's own runtime.",
        )
    return stack


def _require_gpu(device: str) -> None:
    from kvtune.common.errors import KvtuneError
    from kvtune.runtime.device import bench_for

    try:
        bench_for(device)
    except KvtuneError as missing:
        hint = "without --gpu the quality alone is validated."
        raise KvtuneError(f"--gpu: {missing.message}", hint=hint) from missing


def _times(
    document: PolicyDocument,
    policy: Policy,
    loaded: LoadedModel,
    shape: ModelShape,
    samples: Sequence[Sample],
    *,
    largest: bool,
    limit: int | None,
) -> tuple[Times | None, str | None]:
    """Times for what the file was planned for, or why there are none."""
    from kvtune.runtime.largest import Bounds
    from kvtune.tuner.timing import times_or_reason

    served = document.serving
    batch, tokens = (served.batch, served.context_tokens) if served else (None, None)
    return times_or_reason(
        policy, loaded, shape, samples, batch=batch, context_tokens=tokens,
        largest=Bounds() if largest else None,
        served=_served(document, policy, shape, limit) if limit else None,
    )  # fmt: skip


def _served(
    document: PolicyDocument, policy: Policy, shape: ModelShape, limit: int
) -> Served | None:
    """What the file was planned for, and the peak that is printed for it; None off known cards."""
    from kvtune.policies.policy_file.document import Serving
    from kvtune.simulator.cost import policy_cost
    from kvtune.simulator.memory.plan import memory_plan
    from kvtune.tuner.timing import Served, present_gpu

    gpu, planned = present_gpu(), document.serving or Serving()
    if gpu is None:
        return None
    context, generated = planned.context_tokens or 8192, planned.generated_tokens or 256
    tokens = {"context_tokens": context, "generated_tokens": generated}
    at_once = memory_plan(shape, gpu, limit, **tokens, weights="bf16").at(planned.batch or 1)
    peak = policy_cost(policy, at_once).memory
    return Served(at_once.batch, context, generated, limit, peak)


def _model(document: PolicyDocument, asked: str | None) -> tuple[str, ModelShape]:
    """What to load, and its shape: what was asked for, else what the file is for.

    Raises:
        KvtuneError: neither says, or only a name whose weights must be given.
    """
    from kvtune.common.errors import KvtuneError
    from kvtune.tuner.target import read_weights

    name = asked or (document.model.name if document.model else None)
    if name is None:
        raise KvtuneError("the policy file names no model", hint="name one with --model.")
    return read_weights(name)


def _samples(
    loaded: LoadedModel,
    workload: Literal["small", "mixed", "full", "tasks"],
    seed: int,
    texts: Sequence[Path],
) -> list[Sample]:
    """The held-out samples of a workload; no others are made."""
    from dataclasses import replace

    from kvtune.traces.workloads import build, named_workload

    plan = named_workload(workload, seed, texts)
    held_out = {"evaluate": plan.counts["evaluate"]}
    return build(replace(plan, counts=held_out), loaded.tokenizer)


def _run(
    policy: Policy, loaded: LoadedModel, samples: list[Sample], stack: str, progress: Progress
) -> Validation:
    from kvtune.tuner.validate import validate_policy

    return validate_policy(
        policy, loaded, samples, stored_alike=bool(stack), rounding=True, progress=progress
    )
