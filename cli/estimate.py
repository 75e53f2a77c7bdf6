"""``kvtune estimate``: memory and time of a model on cards, with and without a policy."""

from __future__ import annotations

import typer

from kvtune.cli import options
from kvtune.cli.estimate_options import (
    BatchOption,
    ChunkOption,
    ContextOption,
    EvictsOption,
    FormOption,
    GeneratedOption,
    GpuOption,
    PrefixOption,
    PriceOption,
    WeightsOption,
)
from kvtune.cli.output import speaking
from kvtune.cli.stack_options import CacheDtypeOption, ExpertParallelOption

DOES_NOT_FIT = 3


def command(
    model: options.Model,
    gpu: GpuOption = None,
    gpus: options.Gpus = 1,
    total_gpus: options.TotalGpus = None,
    stack: options.Stack = "kvtune",
    engine_args: options.EngineArgs = "",
    engine_version: options.EngineVersion = None,
    kv_cache_dtype: CacheDtypeOption = None,
    expert_parallel: ExpertParallelOption = 1,
    gpu_memory: options.GpuMemory = None,
    gpu_bandwidth: options.GpuBandwidth = None,
    gpu_flops: options.GpuFlops = None,
    mem: options.Memory = None,
    context: ContextOption = None,
    generated: GeneratedOption = None,
    batch: BatchOption = None,
    weights: WeightsOption = None,
    policy: options.PolicyBeside = None,
    evicts: EvictsOption = False,
    prefix: PrefixOption = "0",
    chunk: ChunkOption = None,
    price: PriceOption = None,
    form: FormOption = "table",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Memory and time on a GPU, or which GPU is needed."""
    _check_form(form, as_json)
    from kvtune.cli.estimate_asked import Served, Typed, read

    served = Served(context, generated, batch, weights)
    typed = Typed(
        model, gpu, (gpu_memory, gpu_bandwidth, gpu_flops), mem, served, price, policy, evicts,
        gpus, total_gpus, prefix, chunk, stack, engine_args, engine_version, kv_cache_dtype,
        expert_parallel,
    )  # fmt: skip
    asked, engine = read(typed)
    from kvtune.cli.estimate_answer import judged

    with speaking(as_json or form == "json", quiet) as output:
        answer = judged(asked, engine)
        answer.show(output, form)
        output.finish("estimate", answer.as_dict())
    if not answer.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _check_form(form: str, as_json: bool) -> None:
    from kvtune.common.errors import KvtuneError

    if as_json and form in ("csv", "markdown"):
        raise KvtuneError(
            f"--format {form} and --json are two forms of one answer", hint="give one of them."
        )
