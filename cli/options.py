"""Options that several commands share, each declared once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

MOST_SEQUENCES, MOST_SEED = 10**6, 2**32 - 1


def known_gpu(begun: str) -> list[str]:
    """Names of cards, for shell completion."""
    from kvtune.profiles.gpus import list_gpus

    return [gpu.slug for gpu in list_gpus() if gpu.slug.startswith(begun)]


def known_gpus(begun: str) -> list[str]:
    """The same for a list of cards: its last word is completed."""
    before, comma, last = begun.rpartition(",")
    names = known_gpu(last) + [word for word in ("any",) if word.startswith(last) and not comma]
    return [before + comma + name for name in names]


def known_models(begun: str) -> list[str]:
    """Names of models, for shell completion."""
    from kvtune.profiles.models import list_models

    return [shape.name for shape in list_models() if shape.name.startswith(begun)]


def _device(name: str | None) -> str | None:
    """The device, refused before torch is imported where no machine has one of that name."""
    if name is None or re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        return name
    raise typer.BadParameter(f"{name!r} is no device: use cpu, cuda or cuda:0")


Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout (docs/json.md), nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the answer.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A known name (kvtune models), a Hugging Face folder or id, or a GGUF file.",
        autocompletion=known_models,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        "-g",
        metavar="NAME",
        help="A known card (kvtune gpus) or a card's .yaml file; left out: this machine's.",
        autocompletion=known_gpu,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        help="Memory that the card shows, in place of its profile's.",
    ),
]
GpuBandwidth = Annotated[
    str | None,
    typer.Option("--gpu-bandwidth", metavar="RATE", help="Of its memory, for example 1008GB/s."),
]
GpuFlops = Annotated[
    str | None,
    typer.Option("--gpu-flops", metavar="RATE", help="Dense bf16 rate, for example 165TFLOPS."),
]
Gpus = Annotated[
    int,
    typer.Option("--gpus", "--tp", metavar="N", min=1, help="GPUs that share each layer."),
]
TotalGpus = Annotated[
    int | None,
    typer.Option(
        "--total-gpus",
        metavar="N",
        min=1,
        max=4096,
        help="GPUs in all: every way to use them, as GPUs that share each layer and as copies of "
        "the model, between which --batch is dealt; --gpus keeps to one.",
    ),
]
Stack = Annotated[
    Literal["kvtune", "vllm", "sglang", "trtllm", "llama-cpp"],
    typer.Option(
        "--stack",
        help="Whose kernels: kvtune's own or the datasheet, or a serving stack's as NVIDIA "
        "measured them (pip install 'kvtune[aiconfigurator]'). vllm and llama-cpp also say what "
        "the engine would print of its memory.",
    ),
]
EngineArgs = Annotated[
    str,
    typer.Option(
        "--engine-args",
        metavar="FLAGS",
        help="Flags of vllm serve (--stack vllm) or llama-server (--stack llama-cpp), as they are "
        "given them: those that decide what is allocated are read.",
    ),
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        "--engine-version",
        metavar="VERSION",
        help="Of vLLM, for example 0.19, or llama.cpp's build, b10809; left out: the newest known.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--mem",
        metavar="SIZE",
        help="Memory for everything together, with its unit: 16GB (10^9) or 16GiB (2^30); "
        "left out: all that the card shows.",
    ),
]
Context = Annotated[
    str,
    typer.Option(
        "--context", metavar="TOKENS", help="Prompt tokens of a sequence: 8192 or 32k (k is 1024)."
    ),
]
Generated = Annotated[
    str,
    typer.Option(
        "--generated",
        metavar="TOKENS",
        help="Tokens that each sequence generates, kept in 16 bits.",
    ),
]
Sequences = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        max=MOST_SEQUENCES,
        help="Sequences at once; left out: as many as --max-kl allows.",
    ),
]
WEIGHTS_HELP = (
    "Weight format: bf16, fp8, int8, int4, awq, gptq, mxfp4, nvfp4, nf4, q8_0, q6_k, q5_k_m, "
    "q4_k_m, q4_0, q3_k_m; stored for a checkpoint's own, or auto for the widest that fits."
)
SEVERAL_WEIGHTS_HELP = (
    f"{WEIGHTS_HELP} Several are separated by commas, any is 16, 8 and 4 bits; what narrower "
    "weights lose is counted nowhere."
)
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help=f"{WEIGHTS_HELP} Left out: as --policy was planned, else auto.",
    ),
]
WeightFormats = Annotated[
    str, typer.Option("--weights", metavar="FORMATS", help=SEVERAL_WEIGHTS_HELP)
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, max=MOST_SEED, help="Of everything that is drawn."),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the model runs: cpu or cuda; left out: a GPU if any.",
        callback=_device,
    ),
]
Workload = Annotated[
    Literal["small", "mixed", "full"],
    typer.Option(
        "--workload",
        help="small: nine samples of 1024 tokens, for two CPU cores; mixed: 27, with texts "
        "that no packaged model was trained on (a guide, sources, JSON, logs, conversations, other "
        "languages); full: of 2048, for a GPU.",
    ),
]
HeldOut = Annotated[
    Literal["small", "mixed", "full", "tasks"],
    typer.Option(
        "--workload",
        help="small: texts of 1024 tokens, for two CPU cores; mixed: with a guide, sources, "
        "JSON, logs, conversations and other languages; full: of 2048, for a GPU; tasks: "
        "needles, variable tracking, common words, turns, instructions kept and leaked.",
    ),
]
Trials = Annotated[
    int,
    typer.Option(
        "--trials",
        metavar="N",
        min=1,
        max=100_000,
        help="Trials of the outer study; a stand-in needs none.",
    ),
]
Menu = Annotated[
    Literal["auto", "three", "few", "all"],
    typer.Option(
        "--menu",
        help="Methods that a head may have: three (snapkv, h2o, streaming_llm); few: those with "
        "fitted values and bits by channel; all that choose when the prompt is complete: tried on "
        "a few layers, and the best seven in full; auto: all on a GPU, on a CPU the widest that "
        "adds little time.",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Your own .txt or .jsonl file, instead of the built-in texts; repeatable.",
    ),
]
Shares = Annotated[
    str, typer.Option("--shares", metavar="SHARES", help="Of the bf16 bytes: 5%,10%.")
]
PolicyFile = Annotated[
    Path,
    typer.Argument(
        metavar="POLICY",
        help="A policy file, the run directory that holds one, or words: 'snapkv+adakv 25% int4'.",
    ),
]
PolicyBeside = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="A policy to show beside the full cache: a file, a run directory, or words: "
        "'snapkv+adakv 25% int4'.",
    ),
]
PlannedContext = Annotated[
    str | None, typer.Option("--context", metavar="TOKENS", help="Left out: the file's own.")
]
