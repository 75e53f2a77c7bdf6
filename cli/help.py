"""``--help`` in groups with examples, in plain text that needs no library to draw it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from kvtune.cli.failures import USAGE_ERROR, usage_message
from kvtune.cli.unread import let_typed_win, refuse_unread
from kvtune.cli.wording import EXPLAINED
from kvtune.common.errors import KvtuneError

OTHERS = "Output and help"

COMMANDS = {
    "Plan": ("search", "worker", "estimate"),
    "Look at a study": ("tui", "report", "card"),
    "Check": ("validate", "simulate", "bench", "compare", "capture"),
    "Serve": ("export", "import-policy", "serve-sim"),
    "Machines, models, policies": ("gpus", "models", "policies", "heads", "tables", "profile"),
}

OPTIONS = {
    "What is served": (
        "model",
        "gpu",
        "gpus",
        "total_gpus",
        "mem",
        "context",
        "generated",
        "batch",
        "weights",
        "prefix",
        "chunk",
        "price",
    ),
    "A card and a stack of your own": (
        "stack",
        "engine_args",
        "engine_version",
        "kv_cache_dtype",
        "expert_parallel",
        "gpu_memory",
        "gpu_bandwidth",
        "gpu_flops",
    ),
    "What is asked of the search": (
        "max_kl",
        "trials",
        "menu",
        "read_bytes",
        "tpot",
        "ttft",
        "sequences",
        "sampler",
        "jobs",
        "storage",
        "engine",
        "start",
        "moved_bytes",
        "held_bytes",
        "heads",
        "stand_in",
    ),
    "What it is measured on": (
        "trace",
        "split",
        "workload",
        "text",
        "tokens",
        "lengths",
        "probes",
        "seed",
        "device",
    ),
    "Policy": ("policy", "evicts", "to", "compare", "allow_stand_in", "strict"),
}

OWN_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "serve-sim": {
        "Requests that arrive": (
            "rate",
            "concurrency",
            "requests",
            "prompt",
            "output",
            "length_cv",
            "burstiness",
            "prefix",
            "arrivals",
            "seed",
        ),
        "How they are served": (
            "stack",
            "kv_cache_dtype",
            "expert_parallel",
            "slo_ttft",
            "slo_tpot",
            "max_sequences",
            "max_batched_tokens",
            "order",
            "block",
            "host_mem",
            "left_to_answers",
        ),
    },
    "bench": {"What is compared": ("methods", "shares", "per_kind", "stored")},
    "compare": {"What is compared": ("strategies", "shares", "seconds")},
}
"""Groups that one command alone has, by its name; they win over those of all commands."""

EXAMPLES = {
    "search": (
        "kvtune search --model llama-8b --gpu 4090 --mem 16GB --context 32k",
        "kvtune search --model smollm2-135m --gpu 4090 --mem 1GiB --context 2k",
        "kvtune search --model llama-8b --gpu 4090 --mem 16GB --for vllm",
    ),
    "estimate": (
        "kvtune estimate --model llama-8b --gpu 4090 --context 32k",
        "kvtune estimate --model llama-8b --gpu any --context 32k --batch 8",
        "kvtune estimate --model llama-70b --gpu h100 --total-gpus 8 --batch 64 --price 2.50",
        "kvtune estimate --model llama-8b --gpu 4090 --policy 'snapkv+adakv 25% int4'",
        "kvtune estimate --model llama-8b --gpu h200 --stack vllm --kv-cache-dtype fp8",
        "kvtune estimate --model llama-8b --gpu 4090,h100 --context 8k,32k --batch 1,8 "
        "--price 0.40,2.50 --format markdown",
    ),
    "card": ("kvtune card kvtune-runs/llama-3.1-8b-rtx-4090-16gb --out card",),
    "report": ("kvtune report kvtune-runs/llama-3.1-8b-rtx-4090-16gb",),
    "tui": ("kvtune tui kvtune-runs/llama-3.1-8b-rtx-4090-16gb",),
    "validate": ("kvtune validate kvtune-runs/smollm2-135m-rtx-4090-1gib",),
    "export": (
        "kvtune export policy.yaml --to transformers --out exported",
        "kvtune export policy.yaml --compare",
    ),
    "import-policy": (
        "kvtune import-policy Meta-Llama-3.1-8B-Instruct_kivi_KVTuner4_0.yaml --from kvtuner "
        "--model llama-8b",
    ),
    "capture": ("kvtune capture --model smollm2-135m --out trace",),
    "simulate": ("kvtune simulate policy.yaml --trace trace",),
    "serve-sim": (
        "kvtune serve-sim --model llama-8b --gpu h100 --rate 4 --prompt 2k --output 256 "
        "--slo-ttft 1s --slo-tpot 50ms",
        "kvtune serve-sim --model llama-8b --gpu h200 --gpus 2 --stack vllm --concurrency 64",
        "kvtune serve-sim --model deepseek-v3 --gpu h200 --gpus 8 --stack sglang "
        "--kv-cache-dtype fp8 --concurrency 64",
        "kvtune serve-sim --model llama-8b --gpu 4090 --rate 1 --requests 1000 "
        "--policy kvtune-runs/llama-3.1-8b-rtx-4090-16gb",
    ),
    "gpus": ("kvtune gpus 4090",),
    "models": ("kvtune models llama3.1:8b", "kvtune models --json"),
    "policies": ("kvtune policies show snapkv+adakv",),
}


def _grouped(
    entries: Iterable[tuple[str, Any]], groups: dict[str, tuple[str, ...]], rest: str
) -> dict[str, list[Any]]:
    """Entries below their group's heading, in the order of the groups; those of none come last."""
    heading = {name: title for title, names in groups.items() for name in names}
    found: dict[str, list[Any]] = {title: [] for title in (*groups, rest)}
    for name, entry in entries:
        found[heading.get(name, rest)].append(entry)
    return {title: inside for title, inside in found.items() if inside}


class Command(TyperCommand):
    """A command whose options are grouped, with examples below them."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Read the options; of a wrong value that a file gave, say which file."""
        given = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except USAGE_ERROR as error:
            param = getattr(error, "param", None)
            defaults = parent.find_root().obj if parent is not None else None
            if defaults is None or param is None or set(param.opts) & set(given):
                raise
            path = f"{parent.command_path} {info_name}".partition(" ")[2]
            for told in defaults.told(path, iter([param.name])):
                raise KvtuneError(usage_message(error), where=told) from error
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run what reads all that was typed; of a mistake, say too which options a file gave."""
        try:
            refuse_unread(ctx)
            let_typed_win(ctx)
            return super().invoke(ctx)
        except KvtuneError as error:
            error.hint = _with_origins(ctx, error)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options below a heading for each group."""
        found = [(param.name, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        records = [(name, record) for name, record in found if record]
        groups = OPTIONS | OWN_OPTIONS.get(self.name or "", {})
        for title, rows in _grouped(records, groups, OTHERS).items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write what the answer's signs mean, and examples on one line each that can be copied."""
        super().format_epilog(ctx, formatter)
        if explained := EXPLAINED.get(self.name or ""):
            with formatter.section("In the answer"):
                formatter.write_dl([tuple(each.split(": ", 1)) for each in explained])
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in examples))


def _with_origins(ctx: Any, error: KvtuneError) -> str | None:
    """The hint, and where the options stand that the user may not know of."""
    defaults = ctx.find_root().obj
    taken = (p.name for p in ctx.command.params if _from_file(ctx, p.name))
    path = ctx.command_path.partition(" ")[2]
    told = defaults.told(path, taken) if defaults is not None else []
    return "\n".join(filter(None, (error.hint, *(f"taken from {each}" for each in told)))) or None


def _from_file(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


class Group(TyperGroup):
    """All commands, grouped by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands below a heading for each group; summaries are broken, never cut."""
        rows = [(n, (n, self.commands[n].get_short_help_str(200))) for n in self.list_commands(ctx)]
        for title, inside in _grouped(rows, COMMANDS, "Commands").items():
            with formatter.section(title):
                formatter.write_dl(inside)
